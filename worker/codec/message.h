/* SPDX-License-Identifier: Apache-2.0 */
/*
 * message.h - a prompt and a completion as plain data, between the wire (codec.h) and the engine.
 *
 * docs/messages.md is the contract that people read; schemas/ is the same in Avro. A prompt owns
 * all that it points to (one arena), but for its text where that stayed in the record (codec.h),
 * and is immutable after decoding. Strings are UTF-8 and NUL-terminated, without embedded NULs,
 * except where a length is given.
 */
#ifndef LORAMILL_WORKER_CODEC_MESSAGE_H
#define LORAMILL_WORKER_CODEC_MESSAGE_H

#include "engine/engine.h"

enum encoding { ENCODING_JSON, ENCODING_AVRO };

/* Of a record; value may hold any bytes. */
struct header { const char *name; const void *value; size_t len; };

struct metadata_entry { const char *key, *value; };

struct prompt {
    const char *id;             /* never NULL, never empty */
    const char *adapter;        /* NULL: base model */
    const char *prompt;         /* exactly one of prompt, token_ids, messages */
    size_t prompt_len;
    const int32_t *token_ids;
    int n_token_ids;
    const struct engine_message *messages;
    int n_messages;
    const char *const *context;
    int n_context;
    struct engine_params params;
    int priority;
    bool stream;                /* parts as they come, and a final record */
    int64_t deadline_ms;        /* 0: none */
    int64_t first_token_by_ms;  /* of no use unless the text has begun by then; 0: none */
    const char *tenant, *reply_topic, *correlation_id, *model;  /* NULL: not given */
    const struct metadata_entry *metadata;
    int n_metadata;
    enum encoding encoding;     /* how it came */
    struct arena *arena;
};
void prompt_free(struct prompt *p);     /* NULL is allowed */

/* A record of a streamed reply. */
struct completion_stream {
    const char *generation;     /* one run of the engine: parts of another one are a repeat */
    int seq;                    /* from 0; of the final record: how many parts there were */
    bool final;                 /* the whole completion; else a part: choices hold new text */
};

/* Where a reply lies that is too large for the broker. */
struct completion_claim {
    const char *url, *sha256, *content_type;
    int64_t bytes;
};

/* Everything a reply says beyond the engine's result; borrowed pointers. */
struct completion {
    const struct prompt *prompt;
    const char *adapter_digest; /* NULL: base model */
    const char *model;          /* the base model's name */
    const char *worker;         /* this worker's name */
    const struct engine_result *result;
    int64_t fetch_us;           /* waiting for the adapter to be fetched and loaded */
    int64_t received_to_submit_us;
    const struct completion_stream *stream;     /* NULL: not streamed */
    const struct completion_claim *claim;       /* NULL: the reply is here; else without its text */
    const struct lm_err *error;                 /* NULL: a completion; else why there is none */
};

/* ---- arena: all of a prompt's memory, freed at once ------------------------------------- */
struct arena *arena_new(void);                  /* NULL: out of memory */
enum { ARENA_ALIGN = 16 };
/* One that begins in memory of the caller's, so aligned, which outlives it; at least 64 bytes. */
struct arena *arena_in(void *room, size_t size);
void arena_free(struct arena *a);
void *arena_alloc(struct arena *a, size_t bytes);               /* NULL when exhausted; zeroed */
char *arena_strndup(struct arena *a, const char *s, size_t n);
size_t arena_bytes(const struct arena *a);      /* tests only: what it takes */

#endif
