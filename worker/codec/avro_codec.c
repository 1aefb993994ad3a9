/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_codec.c - whole trees, which tools want; see avro_codec.h. Messages are decoded in
 * avro_consume.c and written in message_out.c.
 */
#include "worker/codec/avro_codec.h"

#include <stdio.h>

#include "worker/codec/avro_path.h"
#include "worker/codec/json_tree.h"

void avro_path_text(const struct avro_path *p, char *buf, size_t size)
{
    size_t used = 0;
    snprintf(buf, size, "top");
    for (int i = 0; i < p->n && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s",
                                 i > 0 && p->at[i][0] != '[' ? "." : "", p->at[i]);
}

lm_status avro_decode(struct avro_plan *p, const void *data, size_t len, json_t **out,
                      struct lm_err *err)
{
    struct json_scratch scratch;
    yyjson_doc *doc = NULL;
    *out = NULL;
    json_scratch_init(&scratch);
    lm_status st = avro_decode_doc(p, data, len, &scratch, &doc, err);
    if (st)
        return st;
    *out = json_from_value(yyjson_doc_get_root(doc));
    yyjson_doc_free(doc);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory");
}
