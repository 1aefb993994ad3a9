/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dlq_marks.h - which letters of a dead-letter topic `loramill dlq retry` has sent back.
 *
 * It is what the group <group.id>-dlq-retry has committed for the topic, in the same form as what
 * workers commit for prompts: before the committed offset there is nothing open, and beyond it the
 * offset map (offset_map.h) says what was sent back. So a mark lies neither in the topic, where
 * other readers would take it for a letter, nor in a place that somebody must set up; and the
 * transaction that sends letters commits their marks.
 *
 * A pure data structure. A mark covers the offsets between a letter and the one before it too: they
 * hold nothing (transaction markers, what compaction took), so that neighbours stay one range.
 */
#ifndef LORAMILL_WORKER_TOOLS_DLQ_MARKS_H
#define LORAMILL_WORKER_TOOLS_DLQ_MARKS_H

#include "worker/offset_map.h"

typedef struct dlq_marks dlq_marks;

/* No mark is added that makes a map longer than `most` bytes. NULL: no memory. */
dlq_marks *dlq_marks_new(int n_partitions, size_t most);
dlq_marks *dlq_marks_copy(const dlq_marks *m);
void dlq_marks_free(dlq_marks *m);              /* NULL is fine */
int dlq_marks_partitions(const dlq_marks *m);

/* What a group has committed; offset < 0: nothing. A map that is none counts as no map. It is
 * committed anew with the next ones, for brokers forget what is older than
 * offsets.retention.minutes. */
void dlq_marks_load(dlq_marks *m, int partition, int64_t offset, const char *map, size_t len);
/* What they say ends here. */
int64_t dlq_marks_end(const dlq_marks *m, int partition);
/* The topic holds nothing before `offset` any more. */
void dlq_marks_begin(dlq_marks *m, int partition, int64_t offset);

bool dlq_marks_has(const dlq_marks *m, int partition, int64_t offset);
/* from <= offset < to. LM_TOO_LARGE: the map would be too long, and nothing has changed. */
lm_status dlq_marks_add(dlq_marks *m, int partition, int64_t from, int64_t to);

/* What is to be committed for a partition whose commit would tell something new, or has not been
 * renewed yet; false: nothing. `map` is "" where there is no need of one. */
bool dlq_marks_commit(const dlq_marks *m, int partition, int64_t *offset,
                      char map[OFFSET_MAP_MAX + 1]);
void dlq_marks_committed(dlq_marks *m);

#endif
