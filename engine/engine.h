/* SPDX-License-Identifier: Apache-2.0 */
/*
 * engine.h - the paged multi-LoRA engine, as the worker sees it. The only engine header that the
 * worker may include.
 *
 * An engine owns one model on one device: base weights, the unified pool of blocks (KV cache and
 * adapter weights), the scheduler and one engine thread that runs steps. Callers submit requests
 * and poll for events; requests with different adapters, of different ranks, and with none share
 * every step.
 *
 * Life of a request
 *
 *   submit --> WAITING --admit--> RUNNING (prefill chunks, then decode) --> FINISHED event
 *                 |                  |
 *                 +---- cancel, deadline, error ----> FINISHED event (reason says which)
 *
 * Every submitted request yields exactly one ENGINE_FINISHED event, whatever happens, unless the
 * engine is closed first. Requests are validated and tokenised in engine_submit(), on the caller's
 * thread, so that a bad one is refused there, with its reason, and never reaches the batch.
 *
 * Ownership: engine_submit() copies what it needs. A result belongs to whoever polled it and is
 * freed with engine_result_free(). Adapters are reference-counted handles: a request holds its own
 * reference until it ends, so a version that is being served can't vanish.
 *
 * Threads: every function may be called from any thread; engine_close() once, when no other call
 * is running.
 */
#ifndef LORAMILL_ENGINE_ENGINE_H
#define LORAMILL_ENGINE_ENGINE_H

#include "kernels/base.h"

typedef struct engine engine;
typedef struct engine_adapter engine_adapter;

/* ---- opening --------------------------------------------------------------------------- */

/* How a preempted sequence comes back: computed again, or copied to host memory and back. */
enum engine_preempt { ENGINE_PREEMPT_CHEAPER, ENGINE_PREEMPT_RECOMPUTE, ENGINE_PREEMPT_SWAP };

/* Numbers of the KV cache: the device's own (bf16 on a GPU, float32 on a CPU), or FP8 (E4M3, scale
 * 1): half the bytes of bf16 a token, so twice the tokens in the pool and half the reads. */
enum engine_kv { ENGINE_KV_AUTO, ENGINE_KV_FP8 };

/* Numbers of the base weights: the device's choice (bf16 where activations are bf16, on a GPU; else
 * as stored); as stored (on a GPU float16 stays, float32 becomes bf16); rounded to bf16; or the
 * layers' matrices in FP8 (E4M3, a scale for each output channel, found at load), with embeddings,
 * head, norms, biases and adapters as they are. FP8_DYNAMIC lets what those matrices are multiplied
 * by become FP8 too, with a scale for each token, where a device is faster with both. */
enum engine_weights {
    ENGINE_WEIGHTS_AUTO, ENGINE_WEIGHTS_STORED, ENGINE_WEIGHTS_BF16,
    ENGINE_WEIGHTS_FP8, ENGINE_WEIGHTS_FP8_DYNAMIC,
};
/* By its name, "auto", "stored", "bf16", "fp8" or "fp8-dynamic"; false if it is none. */
bool engine_weights_parse(const char *name, enum engine_weights *out);

/* What the scheduler prefers. No policy changes what is answered, only when and at what cost;
 * docs/engine.md has the figures behind each default. */
struct engine_policy {
    bool group;                 /* admit by adapter, so that a step meets few; default true */
    int max_overtaken;          /* then the hard bound: so many later ones of the same or a lower
                                 * rank may be admitted before a waiting one; default 4000 */
    int64_t max_wait_ms;        /* of those that have waited longer, one admission in four is,
                                 * oldest first, whatever their rank, so that no flood of higher
                                 * priority starves them; 0: none; default 10 min */
    bool fair;                  /* share between tenants by virtual token counters (Sheng et al.,
                                 * arXiv 2401.00588); default true */
    bool early_abort;           /* end with ENGINE_EXPIRED what can no longer meet its deadline, and
                                 * under overload serve those first who still can; default true */
    enum engine_preempt preempt;
    size_t swap_bytes;          /* host memory for swapped KV; default 1 GiB; 0: never swap */
    bool prefetch;              /* adapters of those next in line are loaded; default true */
    bool prefix_cache;          /* default true */
    bool merge;                 /* merge an adapter that owns the whole stream; default false */
    bool pipeline;              /* plan a step while the device runs the one before; default true,
                                 * where the device runs by itself */
    bool graphs;                /* decode steps run as recorded ones, where the device can; default
                                 * true */
    /* For measuring what the design buys; 0 is the design. */
    int adapter_percent;        /* split pool: adapters get this share, KV cache the rest */
    int adapter_slots;          /* so many adapters resident at most */
};

void engine_policy_default(struct engine_policy *p);

struct engine_config {
    const char *model_dir;      /* Hugging Face folder */
    const char *model_name;     /* NULL: the folder's name */
    const char *backend;        /* "cpu", "cuda" or NULL: cuda where a device works, else cpu */
    int device_index;
    int threads;                /* CPU backend: cores, 0 = all */
    size_t pool_bytes;          /* KV cache and adapters together; 0: what the device has left after
                                 * weights and buffers, less a reserve (engine_info()) */
    int block_tokens;           /* tokens of KV a block; 0: 16 */
    enum engine_kv kv;
    enum engine_weights weights;        /* FP8 excludes policy->merge */
    int max_seqs;               /* sequences in one step; 0: 256 */
    int max_step_tokens;        /* prefill + decode tokens in one step; 0: 2048 (cpu: 512) */
    int max_waiting;            /* submitted, not finished requests; 0: 1024 */
    int max_model_len;          /* 0: the model's own */
    size_t host_adapter_bytes;  /* budget for packed adapters in host memory; 0: 1 GiB */
    size_t max_adapter_bytes;   /* an adapter's files may not be larger; 0: 4 GiB */
    const struct engine_policy *policy; /* NULL: the default */
    const char *shape;          /* instead of model_dir: a config.json alone. Weights are random, so
                                 * only speed means anything; no tokenizer: token ids in and out */
    int shape_layers;           /* of the shape's, only the first so many; 0: all */
    const char *sim;            /* a device description: time is simulated (backend "sim") */
    bool manual;                /* no engine thread: the caller runs engine_pump() */
    bool echo;                  /* no model: answer each prompt with itself. For measuring the road
                                 * around the engine; model_dir may be NULL. */
};

lm_status engine_open(const struct engine_config *cfg, engine **out, struct lm_err *err);
void engine_close(engine *e);   /* drops what is unfinished */

struct engine_info {
    const char *model_name;
    const char *architecture;   /* "LlamaForCausalLM" */
    const char *device;         /* "cpu (avx512, 2 threads)" */
    const char *chat_family;    /* "llama2", "llama3", "mistral", "chatml" or NULL: no chat input */
    int vocab_size, max_model_len, n_layers, hidden;
    int block_tokens, pool_blocks;
    size_t block_bytes;         /* of one layer */
    const char *kv_dtype;       /* "bfloat16", "float32", "float8_e4m3" */
    size_t weight_bytes;
    size_t pool_reserve;        /* device memory left alone when the pool took the rest */
};
void engine_info(const engine *e, struct engine_info *out);     /* strings live with the engine */

/* `manual` engines: runs turns on the caller's thread until none has anything left to do, or the
 * clock has reached `until_us`. *idle: it was the former; new work, or time, is needed. The
 * caller's thread is the engine thread: no other call may run meanwhile. */
lm_status engine_pump(engine *e, int64_t until_us, bool *idle, struct lm_err *err);
/* The engine's clock, microseconds: monotonic, or simulated. engine_wall_ms() is what deadline_ms
 * is held against: epoch milliseconds, or simulated ones. */
int64_t engine_now_us(engine *e);
int64_t engine_wall_ms(engine *e);
/* Lets simulated time pass; LM_UNSUPPORTED with a real clock. */
lm_status engine_advance(engine *e, int64_t until_us);

/* ---- adapters -------------------------------------------------------------------------- */

#define ENGINE_DIGEST_CHARS 72          /* "sha256:" + 64 hex + NUL */
#define ENGINE_ADAPTER_ID_MAX 256

/* 1..256 bytes: segments [A-Za-z0-9][A-Za-z0-9._-]* joined by '/'. */
lm_status engine_adapter_id_check(const char *id, size_t len, struct lm_err *err);

/* Reads a PEFT folder, validates it whole against the model, packs it in host memory and returns a
 * reference. Same id and same content: the version already held. Blocks for the reading.
 * Errors name file, key or tensor: LM_NOT_FOUND, LM_FORMAT, LM_UNSUPPORTED, LM_MISMATCH,
 * LM_TOO_LARGE (with the numbers), LM_NOMEM. */
lm_status engine_adapter_load(engine *e, const char *id, const char *dir, engine_adapter **out,
                              struct lm_err *err);

/* A stand-in for measuring: `rank` on each of `modules` (bits 0..6: q k v o gate up down), with
 * random weights, or none at all on a simulated device. Those of one rank and the same modules
 * share their bytes in host memory (not in the pool), though each counts to the budget for
 * adapters. */
lm_status engine_adapter_dummy(engine *e, const char *id, int rank, unsigned modules,
                               engine_adapter **out, struct lm_err *err);

/* The newest version held in memory under this id, with a reference, or NULL. */
engine_adapter *engine_adapter_find(engine *e, const char *id);
engine_adapter *engine_adapter_ref(engine_adapter *a);
void engine_adapter_unref(engine_adapter *a);           /* NULL is allowed */
const char *engine_adapter_digest(const engine_adapter *a);     /* "sha256:..." */
size_t engine_adapter_bytes(const engine_adapter *a);           /* packed */

/* ---- requests -------------------------------------------------------------------------- */

#define ENGINE_MAX_STOP 16
#define ENGINE_MAX_N 128
#define ENGINE_MAX_LOGPROBS 20

/* Sampling parameters, OpenAI's names and meanings; engine_params_default() fills the defaults of
 * the API, then generation_config.json's where the request is silent (see `set`). */
struct engine_params {
    int max_tokens;             /* default 16; 0 only with echo (scoring) */
    int min_tokens;
    float temperature;          /* default 1 */
    int top_k;                  /* default 0: all (-1 means the same) */
    float top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    bool has_seed;
    uint64_t seed;              /* without one, derived from the request id */
    int n;
    int logprobs;               /* -1: none; else the taken token's plus this many alternatives */
    bool echo;                  /* the prompt leads the text, and with logprobs is scored */
    bool ignore_eos;
    bool skip_special_tokens;   /* default true */
    bool include_stop;          /* keep the stop string in the text; default false */
    const char *stop[ENGINE_MAX_STOP];
    int n_stop;
    const int32_t *stop_token_ids;
    int n_stop_token_ids;
    uint32_t set;               /* ENGINE_SET_*: what the request gave itself */
};

enum {
    ENGINE_SET_TEMPERATURE = 1, ENGINE_SET_TOP_K = 2, ENGINE_SET_TOP_P = 4, ENGINE_SET_MIN_P = 8,
    ENGINE_SET_REPETITION_PENALTY = 16, ENGINE_SET_MAX_TOKENS = 32,
};

void engine_params_default(struct engine_params *p);

struct engine_message {
    const char *role;           /* "system", "user", "assistant" */
    const char *content;        /* UTF-8 */
};

/* Exactly one of prompt, token_ids, messages. */
struct engine_request {
    const char *id;             /* for logs and the default seed; not NULL */
    engine_adapter *adapter;    /* NULL: base model */
    const char *prompt;         /* UTF-8; gets the tokenizer's own special tokens */
    size_t prompt_len;
    const int32_t *token_ids;   /* used verbatim */
    int n_token_ids;
    const struct engine_message *messages;
    int n_messages;
    /* Documents put ahead: joined by blank lines before a string prompt, or before the first
     * system message's content (a system message is made when there is none). Not with
     * token ids. */
    const char *const *context;
    int n_context;
    struct engine_params params;
    int priority;               /* higher first */
    const char *tenant;         /* NULL: none */
    int64_t deadline_ms;        /* wall clock, epoch milliseconds; 0: none */
    int64_t first_token_by_ms;  /* the same: of no use unless it has begun by then; 0: none */
    bool stream;                /* also send ENGINE_TOKENS events */
    void *user;                 /* comes back in every event */
};

typedef uint64_t engine_handle; /* never 0 */

/* LM_BUSY: max_waiting reached, poll and try again; LM_NOMEM: try again later. LM_DEVICE, LM_STATE:
 * the engine has failed, or closes. Everything else is final for this request and says why
 * (LM_INVALID, LM_UNSUPPORTED, LM_TOO_LARGE with the numbers, LM_FORMAT for bad UTF-8). */
lm_status engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                        struct lm_err *err);
/* The request ends with reason ENGINE_CANCELLED; LM_NOT_FOUND when it has already ended. */
lm_status engine_cancel(engine *e, engine_handle h);

/* ---- events ---------------------------------------------------------------------------- */

enum engine_reason { ENGINE_STOP, ENGINE_LENGTH, ENGINE_EXPIRED, ENGINE_CANCELLED, ENGINE_ERROR };
const char *engine_reason_name(enum engine_reason r);   /* "stop", "length", ... */

struct engine_top { int32_t id; float logprob; char *text; };

/* One scored token. text is its piece as bytes (may be part of a character). */
struct engine_token {
    int32_t id;
    float logprob;              /* NaN for a prompt's first token */
    char *text;
    size_t text_len;
    size_t text_offset;         /* bytes into choice text */
    struct engine_top *top;
    int n_top;
};

struct engine_choice {
    int index;
    char *text;                 /* valid UTF-8, NUL-terminated */
    size_t text_len;
    enum engine_reason reason;
    int32_t *token_ids;         /* generated */
    int n_tokens;
    struct engine_token *logprobs;      /* NULL unless asked; with echo the prompt's first */
    int n_logprobs;
};

struct engine_result {
    struct engine_choice *choices;
    int n_choices;
    int prompt_tokens, cached_tokens, completion_tokens;
    lm_status status;           /* why ENGINE_ERROR */
    char error[256];
    /* microseconds since submit */
    int64_t queued_us;          /* until first admitted */
    int64_t adapter_us;         /* of those, while its adapter's weights were on their way */
    int64_t first_token_us, finished_us;
    int steps, preemptions;
};
/* Zeros, with room for n choices behind it in the same block: `choices` points there, n_choices is
 * 0. NULL: no memory. */
struct engine_result *engine_result_new(int n);
void engine_result_free(struct engine_result *r);

enum engine_event_kind { ENGINE_TOKENS, ENGINE_FINISHED };

struct engine_event {
    enum engine_event_kind kind;
    engine_handle handle;
    void *user;
    int choice;                 /* ENGINE_TOKENS */
    char *text;                 /* ENGINE_TOKENS: new text, free() it; NUL-terminated */
    size_t text_len;            /* its bytes, some of which may be NUL */
    struct engine_result *result;       /* ENGINE_FINISHED: the caller frees it */
};

/* Waits up to timeout_ms for the first event, then takes what is there. Returns the count. After
 * a device failure: LM_DEVICE in *state, once all results were delivered; the process should
 * end. */
int engine_poll(engine *e, struct engine_event *out, int max, int timeout_ms, lm_status *state);
/* Makes a waiting engine_poll() return; where none waits, the next one doesn't. */
void engine_wake(engine *e);

/* ---- numbers --------------------------------------------------------------------------- */

struct engine_stats {
    int waiting, running, loading;      /* sequences; loading: of the waiting, for weights */
    int pool_blocks, free_blocks, kv_blocks, adapter_blocks;
    int adapters_host, adapters_resident;
    size_t host_adapter_bytes;
    uint64_t steps, prefill_tokens, decode_tokens, finished, failed, preemptions;
    uint64_t adapter_loads, adapter_evictions, adapter_hits;
    uint64_t step_us, host_us;          /* total; host_us is planning and bookkeeping */
    uint64_t waiting_prompt_tokens;
    uint64_t step_adapters;             /* distinct adapters, summed over steps */
    uint64_t step_seqs;                 /* sequences, summed over steps */
    uint64_t early_aborts;              /* ended by early abort, not by the deadline itself */
    uint64_t swap_outs, swap_ins, swap_bytes, adapter_bytes;    /* bytes moved to and fro; loaded */
    uint64_t prefix_hit_tokens;         /* prompt tokens that were not computed again */
    uint64_t merges, merged_steps;
};
void engine_stats(engine *e, struct engine_stats *out);

#endif
