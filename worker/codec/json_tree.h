/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_tree.h - messages' JSON: from text to a tree, from a tree to text.
 *
 * A busy worker reads and writes tens of thousands of messages a second, so their trees are
 * yyjson's: all of one lies in a few blocks, mostly on the caller's stack, and its strings are not
 * copied. What is not a message (configurations, models, registries, reports, `loramill batch`) is
 * jansson's, and both kinds can be made from each other.
 *
 * Threads: no state.
 */
#ifndef LORAMILL_WORKER_CODEC_JSON_TREE_H
#define LORAMILL_WORKER_CODEC_JSON_TREE_H

#include <jansson.h>
#include <yyjson.h>
#include "worker/codec/bytes.h"

/* Memory for the tree of a message of common size; what has no room there comes from the heap. Not
 * to be moved. */
struct json_scratch {
    yyjson_alc alc;
    size_t used;
    _Alignas(16) char bytes[32 * 1024];
};
void json_scratch_init(struct json_scratch *s);

/* RFC 8259, and stricter: at most 32 deep and 524,288 values, no key twice, no U+0000 in a key,
 * integers within int64, finite numbers, nothing behind the end, an object on top. U+0000 in a
 * string is allowed. A long string may lie in `text`, and is not terminated then; names are.
 * yyjson_doc_free() it before either goes. Errors: LM_FORMAT, with line and column where the
 * grammar is at fault, or LM_TOO_LARGE. */
lm_status json_doc_read(const char *text, size_t len, struct json_scratch *s, yyjson_doc **out,
                        struct lm_err *err);

/* The same as a tree of jansson's, which the caller json_decref()s. */
lm_status json_parse_object(const char *text, size_t len, json_t **out, struct lm_err *err);

/* From one kind to the other. NULL: no memory. A mutable value borrows its strings and keys. */
json_t *json_from_value(yyjson_val *v);
yyjson_mut_val *json_to_value(yyjson_mut_doc *d, const json_t *j);

/* Without white space; *len without the NUL. Numbers have the fewest digits that read back as the
 * same float, where they are one, or double. NULL: no memory. The caller frees. */
char *json_print(const json_t *root, size_t *len);

bool json_is_utf8(const char *s, size_t n);

/* What is printed above, piece by piece. False: not UTF-8. */
bool json_put_text(struct bytes *b, const char *s, size_t n);
void json_put_int(struct bytes *b, int64_t v);
/* Of n thousandths; no digits more than it has. */
void json_put_thousandths(struct bytes *b, int64_t n);
void json_put_real(struct bytes *b, double x);

#endif
