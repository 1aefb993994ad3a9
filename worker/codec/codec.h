/* SPDX-License-Identifier: Apache-2.0 */
/*
 * codec.h - prompts and completions to and from bytes: JSON, and Avro in Confluent's wire format.
 *
 * Choice of encoding (docs/messages.md): content-type application/json is JSON; application/avro or
 * a schema-id header is Avro; without either, a first byte 0x00 or 0x01 is Avro and anything else
 * is tried as JSON. Every refusal names the key at fault.
 *
 * Avro decoding is guarded (caps on bytes, items and depth, vetted writer schemas) and reads by
 * field name from the writer's schema, with our own defaults. Schemas come from the registry by id,
 * and those that it has are kept for ever (schema_cache.h).
 *
 * With `answered` nobody waits for the registry (schema_asker.h): codec_await_schema() comes before
 * codec_decode_prompt(), and says whether the schema is there or will be. Without it, decoding asks
 * and blocks for up to 10 s: for the command line tools.
 *
 * Threads: one decodes at a time; any number may encode, side by side.
 */
#ifndef LORAMILL_WORKER_CODEC_CODEC_H
#define LORAMILL_WORKER_CODEC_CODEC_H

#include "worker/codec/message.h"
#include "worker/codec/registry.h"

typedef struct codec codec;

#define CODEC_MAX_MESSAGE ((size_t)16 << 20)

struct codec_config {
    struct registry_config registry;    /* without a URL: Avro is refused */
    bool auto_register;         /* register the reply schema, else it must be there */
    const char *reply_topic;    /* subject <reply_topic>-value */
    size_t max_message_bytes;   /* 0: CODEC_MAX_MESSAGE */
    const char *model_name;     /* a prompt's `model` must equal it, when not NULL */
    /* See schema_asker.h: from the asker's thread or from within codec_ask_no_more(), it hands over
     * and nothing else. NULL: decoding asks by itself. */
    void (*answered)(void *user, const struct lm_err *trouble);
};

lm_status codec_new(const struct codec_config *cfg, codec **out, struct lm_err *err);
void codec_free(codec *c);

/* What encoding a record has, by the rule above; never fails. */
enum encoding codec_detect(const void *value, size_t len, const struct header *h, int n_headers);

/* LM_OK: the record can be decoded without asking the registry. LM_BUSY: its schema is asked for,
 * and `user` will be answered(), once: with the trouble, or NULL to call this again. Another status
 * (it can heal): neither, *err has the reason. The decoding thread's. */
lm_status codec_await_schema(codec *c, const void *value, size_t len, const struct header *h,
                             int n_headers, void *user, struct lm_err *err);

/* The worker ends: whoever awaits a schema is answered() LM_CANCELLED now, as who asks later. NULL
 * is allowed. */
void codec_ask_no_more(codec *c);

/* The prompt's text may stay in `value`, which is to outlive the prompt. The rest lies in `arena`,
 * which goes with it; NULL: in one of its own.
 * Headers correlation-id / reply topic are the caller's business (worker), not read here.
 * Retriable failures (registry down) have disposition LM_DO_RETRY; everything else is a dead
 * letter. */
lm_status codec_decode_prompt(codec *c, const void *value, size_t len, const struct header *h,
                              int n_headers, struct arena *arena, struct prompt **out,
                              struct lm_err *err);

/* Any message, a completion for instance, as a tree of jansson's; the caller json_decref()s it.
 * Fields that are null in Avro are left out. Nothing about its fields is checked. */
struct json_t;
lm_status codec_decode_tree(codec *c, const void *value, size_t len, const struct header *h,
                            int n_headers, struct json_t **out, struct lm_err *err);

/* JSON only, no codec state: for the command line tools. */
lm_status json_decode_prompt(const char *text, size_t len, struct prompt **out,
                             struct lm_err *err);

/* Asks the registry for the reply schema's id, registering it when auto_register. Called by the
 * first Avro reply anyway; at start-up it shows early what is missing. Any thread. */
lm_status codec_prepare_replies(codec *c, struct lm_err *err);

/* malloc'ed bytes. Avro: LM_NET means that the schema's id is not known yet, try again later. The
 * question for it may block for up to 10 s; with `answered` for 250 ms. */
lm_status codec_encode_completion(codec *c, const struct completion *done, enum encoding enc,
                                  void **out, size_t *len, struct lm_err *err);

#endif
