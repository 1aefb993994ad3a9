/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_tree.h - messages' JSON: from text to a tree, from a tree to text.
 *
 * Trees are jansson's everywhere. Text of messages, of which a busy worker reads and writes tens of
 * thousands a second, goes through yyjson, which takes a tenth of the time jansson takes; the rest
 * (configurations, models, registries, reports) is jansson's on both sides.
 *
 * Threads: no state.
 */
#ifndef LORAMILL_WORKER_JSON_TREE_H
#define LORAMILL_WORKER_JSON_TREE_H

#include <jansson.h>
#include "kernels/base.h"

/* RFC 8259, and stricter: at most 32 deep and 524,288 values, no key twice, no U+0000 in a key,
 * integers within int64, finite numbers, nothing behind the end, an object on top. U+0000 in a
 * string is allowed. The caller json_decref()s. Errors: LM_FORMAT, with line and column where the
 * grammar is at fault, or LM_TOO_LARGE. */
lm_status json_parse_object(const char *text, size_t len, json_t **out, struct lm_err *err);

/* Without white space; *len without the NUL. Numbers have the fewest digits that read back as the
 * same float, where they are one, or double. NULL: no memory. The caller frees. */
char *json_print(const json_t *root, size_t *len);

/* A JSON string of n bytes. NULL: they are not UTF-8, or there is no memory. */
json_t *json_text(const char *s, size_t n);
/* Which of the two? */
bool json_is_utf8(const char *s, size_t n);

#endif
