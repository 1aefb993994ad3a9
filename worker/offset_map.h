/* SPDX-License-Identifier: Apache-2.0 */
/*
 * offset_map.h - finished offsets beyond a committed one, as text that fits the metadata field of
 * an offset commit. Pure functions.
 *
 *   "lm1:" base64url( kind  base  runs-or-bits  checksum )
 *
 *   kind       1 byte: 0 runs, 1 bits; the encoder takes the smaller one
 *   base       varint: the committed offset that the map was written for. A map is believed only
 *              beside that very offset, so that a group that another tool has moved (a reset, a
 *              copy, a mirror) starts where it was moved to and skips nothing
 *   runs       varint pairs (distance from the last end, or from base; length), to the checksum
 *   bits       varint distance of the first bit from base, then 8 offsets a byte, lowest first
 *   checksum   XXH32 of all before, 4 bytes little-endian
 *
 * In a commit's metadata OFFSET_MAP_SEPARATOR and a mark (quarantine.h) may follow it.
 *
 * Varints are LEB128, unsigned. ASCII only, because brokers and clients hand metadata on as a
 * string. "lm1" is the version: a reader that does not know it ignores the map, which costs repeats
 * and loses nothing.
 *
 * The map is an optimisation of repeats, never a condition of delivery: anything that is not a
 * well-formed map is refused as a whole, and the partition is read from its committed offset.
 */
#ifndef LORAMILL_WORKER_OFFSET_MAP_H
#define LORAMILL_WORKER_OFFSET_MAP_H

#include "kernels/base.h"

enum {
    OFFSET_MAP_MAX = 4096,              /* a broker's default offset.metadata.max.bytes */
    OFFSET_MAP_SEPARATOR = ',',
};

struct offset_range { int64_t from, to; };      /* from <= offset < to */

/* Length of the text for these ranges, which ascend from `base` on and don't overlap. */
size_t offset_map_size(int64_t base, const struct offset_range *r, size_t n);

/* The longest text that these ranges can become when no offset reaches `end`, and when as runs they
 * take at most `more` bytes of payload more. */
size_t offset_map_bound(int64_t base, int64_t end, const struct offset_range *r, size_t n,
                        size_t more);

/* Writes the text and a NUL, at most `limit` (<= OFFSET_MAP_MAX) bytes before that; returns its
 * length, 0 for no ranges. Of ranges that don't all fit the lowest are taken; *covered says how
 * many. */
size_t offset_map_encode(int64_t base, const struct offset_range *r, size_t n, size_t limit,
                         char out[OFFSET_MAP_MAX + 1], size_t *covered);

/* Believes nothing. LM_NOT_FOUND: empty, or another tool's text; LM_UNSUPPORTED: another version of
 * ours; LM_MISMATCH: for another offset; LM_FORMAT: damaged. *out is malloc'ed, ascends, doesn't
 * overlap and lies at `base` or beyond. */
lm_status offset_map_decode(const char *text, size_t len, int64_t base, struct offset_range **out,
                            size_t *n, struct lm_err *err);

#endif
