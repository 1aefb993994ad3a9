/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config_table.c - every property of the worker, once: name, type, place in struct config, default,
 * bounds and the sentence that explains it. The parser, --help, docs/configuration.md and
 * ops/loramill.properties all come from here, so none of them can disagree.
 */
#include "worker/config.h"

#include <stddef.h>

#define AT(field) offsetof(struct config, field)
#define STR(name, field, dflt, flags, help) \
    { name, CONFIG_STRING, AT(field), dflt, 0, 0, NULL, flags, help }
#define CHOICE(name, field, dflt, choices, help) \
    { name, CONFIG_CHOICE, AT(field), dflt, 0, 0, choices, 0, help }
#define INT(name, field, dflt, min, max, help) \
    { name, CONFIG_INT, AT(field), dflt, min, max, NULL, 0, help }
#define BYTES(name, field, dflt, min, max, help) \
    { name, CONFIG_BYTES, AT(field), dflt, min, max, NULL, 0, help }
#define BOOL(name, field, dflt, help) \
    { name, CONFIG_BOOL, AT(field), dflt, 0, 0, NULL, 0, help }

#define TiB ((int64_t)1 << 40)
#define DAY_MS 86400000

static const struct config_property model_rows[] = {
    STR("model.path", model_path, "", 0,
        "Folder of the base model in Hugging Face layout. Required unless engine.mode=echo."),
    STR("model.name", model_name, "", 0,
        "The name that replies carry and that a prompt's `model` must equal. Empty: the folder's."),
    CHOICE("engine.mode", engine_mode, "model", "model|echo",
        "`echo` answers each prompt with itself, without a model: for measuring the road around "
        "the engine."),
    CHOICE("backend", backend, "auto", "auto|cpu|cuda",
        "`auto` takes cuda where a device works, else cpu."),
    INT("device.index", device_index, "0", 0, 1023, "Which GPU, as the driver counts them."),
    INT("threads", threads, "0", 0, 4096, "CPU backend: cores to use; 0: all."),
    BYTES("engine.pool_bytes", pool_bytes, "0", 0, 64 * TiB,
        "KV cache and resident adapters together; 0: what the device has left."),
    CHOICE("engine.kv_dtype", kv_dtype, "auto", "auto|fp8",
        "Numbers of the KV cache. `auto`: bfloat16 on a GPU, float32 on a CPU. `fp8`: E4M3, which "
        "takes half the memory of bfloat16, for twice the tokens, at some loss of accuracy."),
    CHOICE("engine.weights_dtype", weights_dtype, "auto", "auto|stored|bf16|fp8|fp8-dynamic",
        "Numbers of the base weights. `auto`: bfloat16 on a GPU, as the checkpoint stores "
        "them on a CPU. `stored`: float16 stays float16 on a GPU too, which is slower there "
        "(float32 becomes bfloat16 still). `bf16`: rounded to bfloat16 everywhere. `fp8`: the "
        "layers' matrices are rounded to E4M3 when they are loaded, with a scale for each "
        "output channel: half the memory, at some loss of accuracy; activations are not. "
        "`fp8-dynamic`: in steps of more than 32 tokens activations are too, with a scale for "
        "each token, on GPUs that multiply FP8 (compute capability 9.0): faster, less "
        "accurate. FP8 not with engine.merge."),
    INT("engine.max_seqs", max_seqs, "0", 0, 65536,
        "Sequences in one step; 0: the engine's default (256)."),
    INT("engine.max_step_tokens", max_step_tokens, "0", 0, 1 << 20,
        "Prefill and decode tokens in one step; 0: the engine's default."),
    INT("engine.max_waiting", max_waiting, "0", 0, 1 << 20,
        "Requests in the engine, submitted and not finished; 0: the engine's default (1024)."),
    INT("engine.max_model_len", max_model_len, "0", 0, 1 << 24,
        "Longest prompt plus completion in tokens; 0: the model's own limit."),
    BOOL("engine.group", engine_group, "true",
        "Prompts of adapters that are in the batch are admitted before others of the same "
        "priority, so that a step meets few adapters."),
    INT("engine.max_overtaken", engine_max_overtaken, "4000", 1, 1 << 30,
        "So many later prompts of the same or a lower priority may begin before one that waits; "
        "then nobody else does until it has."),
    INT("engine.max_wait_ms", engine_max_wait_ms, "600000", 0, (int64_t)365 * DAY_MS,
        "Of those that have waited longer in the engine, one in four that begin is, whatever their "
        "priority; 0: none."),
    BOOL("engine.fair", engine_fair, "true",
        "Share the engine between tenants, within a priority, by tokens served. Prompts without "
        "`tenant` are one tenant's."),
    BOOL("engine.early_abort", engine_early_abort, "true",
        "End a prompt as expired as soon as it can't meet its deadline any more, and under "
        "overload serve those first who still can."),
    CHOICE("engine.preempt", engine_preempt, "cheaper", "cheaper|recompute|swap",
        "What happens to the KV cache of a sequence that must yield: computed again later, copied "
        "to host memory and back, or whichever is estimated to be cheaper."),
    BYTES("engine.swap_bytes", engine_swap_bytes, "1G", 0, 64 * TiB,
        "Host memory for that; 0: none."),
    BOOL("engine.prefetch", engine_prefetch, "true",
        "Copy the adapters of those next in line to the device ahead of their turn."),
    BOOL("engine.prefix_cache", engine_prefix_cache, "true",
        "Keep the KV cache of prompts for others that begin alike, per adapter version."),
    BOOL("engine.merge", engine_merge, "false",
        "Merge an adapter into the weights while it owns the whole stream, where that is faster."),
    BOOL("engine.pipeline", engine_pipeline, "true",
        "Plan a step while the device computes the one before."),
};

static const struct config_property adapter_rows[] = {
    STR("adapters.url", adapters_url, "", CONFIG_URL,
        "URL template with `{adapter}` behind the host; `adapter_config.json` and "
        "`adapter_model.safetensors` lie under it. http, https or file. Empty: prompts that name "
        "an adapter are dead letters."),
    STR("adapters.cache_dir", adapters_cache_dir, "", 0,
        "Disk cache, which all workers of a host may share. Empty: "
        "$XDG_CACHE_HOME/loramill/adapters, or ~/.cache/loramill/adapters, or "
        "/var/cache/loramill/adapters without a home."),
    BYTES("adapters.max_bytes", adapters_max_bytes, "4G", 1, TiB,
        "An adapter's files together may not be larger."),
    BYTES("adapters.host_bytes", adapters_host_bytes, "1G", 1, 64 * TiB,
        "Host memory for adapters that are loaded but not on the device."),
    INT("adapters.concurrency", adapters_concurrency, "8", 1, 256, "Transfers at a time."),
    INT("adapters.max_attempts", adapters_max_attempts, "5", 1, 100,
        "Tries of one transfer before the prompt waits `retry.backoff_ms` and asks again."),
    INT("adapters.negative_ttl_ms", adapters_negative_ttl_ms, "30000", 0, DAY_MS,
        "How long an unknown adapter is remembered as unknown; 0: not at all."),
    STR("adapters.ca_file", adapters_ca_file, "", 0, "PEM file of the store's authority."),
    STR("adapters.auth_header", adapters_auth_header, "", CONFIG_SECRET,
        "A whole header, such as `Authorization: Bearer ...`, sent with every request."),
};

static const struct config_property topic_rows[] = {
    STR("topics.prompts", topics_prompts, "prompts", CONFIG_REQUIRED,
        "Topics to read, comma-separated; one that starts with `^` is a regular expression."),
    STR("topics.priorities", topics_priorities, "", 0,
        "`topic=priority` pairs, comma-separated; added to each prompt's own `priority`, 0 where a "
        "topic is not named. Prompts of the most urgent topic are still read when the others have "
        "filled three quarters of the intake."),
    STR("topics.replies", topics_replies, "replies", CONFIG_REQUIRED,
        "Where completions go unless the prompt names an allowed topic."),
    STR("topics.replies_allowed", topics_replies_allowed, "", 0,
        "Further topics that a prompt may ask its reply to be sent to: comma-separated, exact "
        "names or `prefix*`. Any other is a dead letter."),
    STR("topics.dead_letters", topics_dead_letters, "dead-letters", CONFIG_REQUIRED,
        "Where prompts go that can't be answered, with the reason in headers."),
    STR("topics.control", topics_control, "", 0,
        "Orders to cancel prompts, `{\"cancel\": \"ID\"}`; every worker reads all of it. Empty: "
        "none."),
    INT("control.retention_ms", control_retention_ms, "3600000", 1000, 30LL * DAY_MS,
        "How long an order is remembered, for prompts that are read after it."),
    INT("control.skew_ms", control_skew_ms, "60000", 0, DAY_MS,
        "How far the clocks of those who send prompts and orders may be apart: an order also "
        "means a prompt of its id that is stamped up to so much later. An id that is to be used "
        "again has to wait for so long."),
    CHOICE("replies.encoding", replies_encoding, "same", "same|json|avro",
        "`same`: as the prompt came."),
    BOOL("errors.reply", errors_reply, "false",
        "Also tell a waiting requester of a dead letter: an error reply to a prompt that has a "
        "correlation id or names a reply topic."),
    INT("stream.interval_ms", stream_interval_ms, "100", 0, 60000,
        "Least time between two parts of one streamed reply; text that comes sooner goes into the "
        "next part."),
    BYTES("message.max_bytes", message_max_bytes, "16M", 1024, 1 << 30,
        "Largest prompt that is decoded and largest reply that is produced. The broker's own "
        "limits hold as well."),
    CHOICE("replies.too_large", replies_too_large, "refuse", "refuse|claim",
        "A reply that is too large for the broker: `refuse` makes a dead letter that names the "
        "sizes, `claim` puts it into the object store and replies with where it is."),
    STR("replies.claim_url", claim_url, "", CONFIG_URL,
        "URL template with `{object}` (the SHA-256 of its bytes) behind the host, for PUT. "
        "Required by replies.too_large=claim. http or https; as claims name it, without a "
        "password."),
    STR("replies.claim_auth_header", claim_auth_header, "", CONFIG_SECRET,
        "A whole header, such as `Authorization: Bearer ...`, sent with every PUT."),
    STR("replies.claim_s3_region", claim_s3_region, "", 0,
        "Signs every PUT for this region of an S3 store, with replies.claim_s3_key and "
        "replies.claim_s3_secret. The token of temporary keys can be given in "
        "replies.claim_auth_header, as `x-amz-security-token: ...`."),
    STR("replies.claim_s3_key", claim_s3_key, "", 0, "Access key id."),
    STR("replies.claim_s3_secret", claim_s3_secret, "", CONFIG_SECRET, "Secret access key."),
    BYTES("replies.claim_above", claim_above, "900K", 1024, 1 << 30,
        "With claim: replies larger than this go to the object store at once; smaller ones only "
        "when the broker refuses them."),
    STR("headers.correlation_id", headers_correlation_id, "kafka_correlationId", CONFIG_REQUIRED,
        "Header whose bytes the reply repeats. `correlation-id` is repeated too."),
    STR("headers.reply_topic", headers_reply_topic, "kafka_replyTopic", CONFIG_REQUIRED,
        "Header that names the reply topic; it wins over the prompt's `reply_topic`."),
    STR("headers.reply_partition", headers_reply_partition, "kafka_replyPartition",
        CONFIG_REQUIRED, "Header with the reply's partition, 4 bytes, big-endian."),
};

static const struct config_property registry_rows[] = {
    STR("registry.url", registry_url, "", CONFIG_URLS,
        "Schema registry, Confluent API. Empty: Avro is refused by name."),
    STR("registry.auth", registry_auth, "", CONFIG_SECRET, "`user:password` for basic auth."),
    STR("registry.auth_header", registry_auth_header, "", CONFIG_SECRET,
        "A whole header, such as `Authorization: Bearer ...`, sent with every request."),
    STR("registry.ca_file", registry_ca_file, "", 0, "PEM file of the registry's authority."),
    STR("registry.cert_file", registry_cert_file, "", 0,
        "PEM file of the worker's own certificate, for a registry that asks for one (mutual TLS)."),
    STR("registry.key_file", registry_key_file, "", 0,
        "PEM file of its private key, without a passphrase. Empty: in registry.cert_file, too."),
    BOOL("registry.auto_register", registry_auto_register, "true",
        "Register the reply schema at start; with false it must be there."),
};

static const struct config_property flow_rows[] = {
    STR("group.id", group_id, "loramill", CONFIG_REQUIRED,
        "Consumer group; its workers share the prompt topics' partitions."),
    STR("worker.name", worker_name, "", 0,
        "In replies, dead letters, logs and metrics. No two workers of a group may have the same. "
        "Empty: host name, process id and a random number."),
    CHOICE("delivery.mode", delivery_mode, "at-least-once", "at-least-once|exactly-once",
        "`exactly-once`: replies, dead letters, offsets and the offset map become durable "
        "together, in one transaction; readers with isolation.level=read_committed see each id "
        "once."),
    CHOICE("delivery.order", delivery_order, "none", "none|key",
        "`key`: of a partition's prompts with the same record key one is at work at a time, in "
        "their order. Costs batching when few keys hold many prompts."),
    STR("transaction.id", transaction_id, "", 0,
        "exactly-once: the producer's transactional.id, which no other worker may have: of two "
        "the later one ends the other. Empty: `<group.id>-<worker.name>`. A name that survives a "
        "restart frees readers of an open transaction at once, else after "
        "kafka.producer.transaction.timeout.ms (10 s)."),
    INT("transaction.interval_ms", transaction_interval_ms, "100", 1, 60000,
        "exactly-once: how long finished replies may wait for the next transaction."),
    INT("transaction.max_messages", transaction_max_messages, "10000", 1, 100000,
        "exactly-once: a transaction ends early when it has so many, and holds no more."),
    INT("intake.max_messages", intake_max_messages, "1000", 1, 10000000,
        "Prompts read but not yet in the engine; above it partitions pause, below half of it they "
        "resume."),
    BYTES("intake.max_bytes", intake_max_bytes, "64M", 1024, TiB,
        "The same in bytes, counted over everything read and not yet answered, replies included."),
    INT("intake.max_tokens", intake_max_tokens, "4000000", 1, 1000000000000,
        "The same in tokens, counted over everything read and not yet generated: of each prompt "
        "its own, as estimated from its length, and, once its adapter is here, for each completion "
        "max_tokens or what the model takes, whichever is less; an eighth of this at most, "
        "and of topics that are not the most urgent no more than their share has room for."),
    INT("in_flight.max_messages", in_flight_max_messages, "8000", 1, 10000000,
        "Prompts read and not yet answered, wherever they are. While it is not set, at least "
        "intake.max_messages and, exactly-once, one and a half times transaction.max_messages."),
    INT("commit.interval_ms", commit_interval_ms, "1000", 10, 3600000,
        "How often finished offsets are committed; what a crash can repeat."),
    INT("commit.map_max_bytes", commit_map_max_bytes, "4096", 0, 4096,
        "Most bytes of the map of finished offsets that travels in a commit's metadata, so that a "
        "crash or a rebalance repeats unfinished prompts only, with the mark that counts poison "
        "prompts (112 bytes of it; below 224 there is none). Not above the broker's "
        "offset.metadata.max.bytes. 0: no map, but what one holds that is found is handed on until "
        "the watermark has passed it; with delivery.mode=exactly-once a finished prompt then "
        "waits for all earlier ones of its partition. Lowered to another value, what an earlier "
        "map holds beyond that is cut off, and may be answered again."),
    INT("drain.timeout_ms", drain_timeout_ms, "30000", 0, DAY_MS,
        "At SIGTERM, how long running prompts may still take. What is unfinished then is handed "
        "back uncommitted."),
    INT("revoke.drain_ms", revoke_drain_ms, "5000", 0, 600000,
        "When a partition is taken away, how long its running prompts may still take. Nothing new "
        "is read meanwhile. Keep it well below kafka.max.poll.interval.ms."),
    INT("retry.max_attempts", retry_max_attempts, "5", 1, 1000,
        "Times the engine may fail a prompt for a reason that can heal before it is a dead "
        "letter. Outages of broker, registry or adapter store are waited out, without a limit."),
    INT("poison.max_attempts", poison_max_attempts, "3", 0, 100,
        "A prompt with which workers die (crash, or hang) is a dead letter after at most one try "
        "more than this, by whatever workers of the group; from the last but one on it runs "
        "alone, so that its neighbours are not blamed. The count travels in the commit metadata. "
        "0: off. At least 2 else."),
    STR("journal.dir", journal_dir, "", 0,
        "Where workers note what is in the engine, for those who come after a crash on the same "
        "host; it tells more than the commit metadata: which prompts, and what killed them. "
        "Empty: $XDG_STATE_HOME/loramill/journal, or ~/.local/state/loramill/journal, or "
        "/var/lib/loramill/journal without a home."),
    INT("engine.hang_timeout_ms", hang_timeout_ms, "300000", 0, DAY_MS,
        "An engine that runs prompts and makes no step for so long has hung: the process ends, "
        "with status 1. 0: never."),
    INT("blocked.warn_ms", blocked_warn_ms, "60000", 0, DAY_MS,
        "A prompt that is unfinished for so long, while later ones of its partition are finished, "
        "is named in the log. 0: never."),
    INT("retry.deadline_ms", retry_deadline_ms, "600000", 1000, 7LL * DAY_MS,
        "No such retry later than this after the prompt was read."),
    INT("deadline.default_ms", deadline_default_ms, "0", 0, 365LL * DAY_MS,
        "Deadline of prompts that have none, counted from their record's timestamp, by whoever "
        "stamped it: what is sent again with its old timestamp has expired. 0: none."),
    INT("retry.backoff_ms", retry_backoff_ms, "200", 1, DAY_MS,
        "First pause before a retry; doubles each time, with jitter."),
    INT("retry.backoff_max_ms", retry_backoff_max_ms, "15000", 1, DAY_MS,
        "Longest pause before a retry."),
};

static const struct config_property watch_rows[] = {
    STR("http.address", http_address, "0.0.0.0", CONFIG_REQUIRED,
        "IPv4 or IPv6 address of /metrics, /livez, /readyz and /startupz."),
    INT("http.port", http_port, "9464", 0, 65535,
        "0: no HTTP. When the port is busy the next free one of the following 99 is taken and "
        "logged, so that workers of a host may share one file."),
    STR("traces.otlp_url", traces_otlp_url, "", CONFIG_URL,
        "OpenTelemetry collector that gets spans of prompts whose `traceparent` says \"sampled\", "
        "over HTTP as JSON: `http://collector:4318/v1/traces`. Empty: none."),
    STR("traces.auth_header", traces_auth_header, "", CONFIG_SECRET,
        "A whole header, such as `Authorization: Bearer ...`, sent with them."),
    STR("traces.ca_file", traces_ca_file, "", 0, "PEM file of the collector's authority."),
    CHOICE("log.level", log_level, "info", "error|warn|info|debug", "Least important line shown."),
    CHOICE("log.format", log_format, "text", "text|json", "One line an event on standard error."),
};

#define SECTION(title, rows) { title, rows, (int)LM_COUNT(rows) }

static const struct config_section sections[] = {
    SECTION("Model and engine", model_rows),
    SECTION("Adapters", adapter_rows),
    SECTION("Topics and messages", topic_rows),
    SECTION("Schema registry", registry_rows),
    SECTION("Group, flow and delivery", flow_rows),
    SECTION("Watching it", watch_rows),
};

const struct config_section *config_sections(int *n)
{
    *n = (int)LM_COUNT(sections);
    return sections;
}

static const struct config_owned owned[] = {
    { "group.id", "set group.id instead" },
    { "enable.auto.commit", "offsets are committed after the reply's acknowledgement only" },
    { "enable.auto.offset.store", "offsets are committed after the reply's acknowledgement only" },
    { "auto.commit.enable", "offsets are committed after the reply's acknowledgement only" },
    { "auto.commit.interval.ms", "set commit.interval_ms instead" },
    { "offset.store.method", "offsets are stored by the broker only" },
    { "enable.idempotence", "replies are always produced idempotently" },
    { "acks", "replies are always acknowledged by all in-sync replicas" },
    { "request.required.acks", "replies are always acknowledged by all in-sync replicas" },
    { "transactional.id", "set transaction.id instead, with delivery.mode=exactly-once" },
    { "enable.partition.eof", "the worker has no use for end-of-partition events" },
    { "log.queue", "the worker owns the log" },
    { "log_cb", "callbacks can't be configured" },
    { "dr_msg_cb", "callbacks can't be configured" },
    { "rebalance_cb", "callbacks can't be configured" },
    { "offset_commit_cb", "callbacks can't be configured" },
    { "opaque", "callbacks can't be configured" },
    { "delivery.report.only.error", "every acknowledgement is needed" },
    { "message.max.bytes", "set message.max_bytes instead" },
};

const struct config_owned *config_owned(int *n)
{
    *n = (int)LM_COUNT(owned);
    return owned;
}
