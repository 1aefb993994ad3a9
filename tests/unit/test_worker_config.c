/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_config.c - the parser by its table, every refusal by its words, and secrets.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "folder.h"
#include "engine/engine.h"
#include "worker/tools/cli.h"
#include "worker/config.h"
#include "worker/kafka_conf.h"
#include "worker/worker.h"

static struct config cfg;
static struct lm_err err;

static int setup(void **state)
{
    (void)state;
    return config_init(&cfg, &err);
}

static int teardown(void **state)
{
    (void)state;
    config_release(&cfg);
    return 0;
}

static void good(const char *assignment)
{
    if (config_set(&cfg, assignment, &err))
        fail_msg("%s: %s", assignment, err.msg);
}

static void says(const char *words)
{
    if (!strstr(err.msg, words))
        fail_msg("expected '%s' in: %s", words, err.msg);
}

static void bad(const char *assignment, const char *words)
{
    memset(&err, 0, sizeof err);
    if (!config_set(&cfg, assignment, &err))
        fail_msg("%s was accepted", assignment);
    says(words);
}

static void minimal(void)
{
    good("engine.mode=echo");
    good("kafka.bootstrap.servers=localhost:9092");
}

static void bad_check(const char *assignment, const char *words)
{
    minimal();
    good(assignment);
    memset(&err, 0, sizeof err);
    if (!config_check(&cfg, &err))
        fail_msg("%s passed the check", assignment);
    says(words);
}

static void test_defaults(void **state)
{
    (void)state;
    assert_string_equal(cfg.topics_prompts, "prompts");
    assert_int_equal(cfg.adapters_max_bytes, 4ll << 30);
    assert_true(cfg.registry_auto_register);
    assert_int_equal(cfg.n_kafka, 0);
    struct engine_policy p;
    engine_policy_default(&p);
    assert_true(cfg.engine_group == p.group && cfg.engine_fair == p.fair);
    assert_true(cfg.engine_early_abort == p.early_abort && cfg.engine_prefetch == p.prefetch);
    assert_true(cfg.engine_prefix_cache == p.prefix_cache && cfg.engine_merge == p.merge);
    assert_true(cfg.engine_pipeline == p.pipeline);
    assert_int_equal(cfg.engine_max_overtaken, p.max_overtaken);
    assert_int_equal(cfg.engine_max_wait_ms, p.max_wait_ms);
    assert_int_equal(cfg.engine_swap_bytes, p.swap_bytes);
    assert_int_equal(p.preempt, ENGINE_PREEMPT_CHEAPER);
    assert_string_equal(cfg.engine_preempt, "cheaper");
    assert_string_equal(cfg.kv_dtype, "auto");
    minimal();
    assert_int_equal(config_check(&cfg, &err), LM_OK);
}

static void test_types(void **state)
{
    (void)state;
    good(" intake.max_bytes = 3MiB ");
    assert_int_equal(cfg.intake_max_bytes, 3 << 20);
    good("intake.max_bytes=2k");
    assert_int_equal(cfg.intake_max_bytes, 2048);
    good("registry.auto_register=false");
    assert_false(cfg.registry_auto_register);
    good("model.path=/a = b");
    assert_string_equal(cfg.model_path, "/a = b");
    good("backend=cpu");
    assert_string_equal(cfg.backend, "cpu");
}

static void test_refusals(void **state)
{
    (void)state;
    bad("", "not key=value");
    bad("model.path", "not key=value");
    bad("kafka.sasl.password hunter2", "not key=value");
    assert_null(strstr(err.msg, "hunter2"));
    bad("kafka.sasl.password aHVudGVyMg==", "not key=value");
    assert_null(strstr(err.msg, "aHVudGVyMg"));
    bad("kafka.sasl.password:aHVudGVyMg==", "not key=value");
    assert_null(strstr(err.msg, "aHVudGVyMg"));
    bad("aHVudGVyMg==", "unknown key of 10 bytes");     /* a second line */
    assert_null(strstr(err.msg, "aHVudGVyMg"));
    bad("caf\xc3\xa9=1", "not key=value");
    bad("=x", "no key");
    bad("topic.prompts=x", "did you mean 'topics.prompts'");
    bad("session.timeout.ms=1", "kafka.session.timeout.ms");
    bad("http.port=eighty", "not a whole number");
    bad("http.port=65536", "out of range 0..65535");
    bad("http.port=-1", "out of range");
    bad("http.port=80x", "not a whole number");
    bad("http.port=99999999999999999999", "not a whole number");
    bad("http.port=", "not a whole number");
    bad("intake.max_bytes=1Q", "not a whole number of bytes");
    bad("intake.max_bytes=9000000000G", "not a whole number of bytes");
    bad("registry.auto_register=yes", "use true or false");
    bad("replies.encoding=xml", "use one of same|json|avro");
    bad("backend=", "use one of");
    bad("kafka.=1", "lacks a librdkafka property");
    bad("kafka.consumer.=1", "lacks a librdkafka property");
    char longer[400];
    memset(longer, 'k', sizeof longer);
    memcpy(longer + 300, "=1", 3);
    bad(longer, "unknown key of 300 bytes");
}

static void test_owned_are_refused(void **state)
{
    (void)state;
    int n;
    const struct config_owned *o = config_owned(&n);
    assert_true(n > 10);
    for (int i = 0; i < n; i++) {
        char text[200];
        snprintf(text, sizeof text, "kafka.%s=1", o[i].key);
        bad(text, o[i].why);
        snprintf(text, sizeof text, "kafka.consumer.%s=1", o[i].key);
        bad(text, o[i].key);
    }
}

static void test_checks(void **state)
{
    (void)state;
    assert_int_equal(config_check(&cfg, &err), LM_INVALID);
    says("model.path is not set");
    good("engine.mode=echo");
    assert_int_equal(config_check(&cfg, &err), LM_INVALID);
    says("kafka.bootstrap.servers is not set");
}

static const struct { const char *set, *words; } check_rows[] = {
    { "topics.prompts=", "topics.prompts may not be empty" },
    { "topics.control=a b", "topics.control" },
    { "topics.control=prompts", "'prompts' is also topics.control, which would feed the worker "
      "orders as prompts" },
    { "poison.max_attempts=1", "use 0 (off) or 2 and more" },
    { "replies.too_large=claim", "needs replies.claim_url with {object}" },
    { "topics.replies=", "topics.replies may not be empty" },
    { "topics.replies=a b", "holds ' '" },
    { "topics.prompts=ok,b@d", "holds '@'" },
    { "topics.prompts=one, replies", "also topics.replies" },
    { "topics.prompts=dead-letters", "also topics.dead_letters" },
    { "topics.prompts=^.*", "'^.*' is also topics.replies=replies" },
    { "topics.prompts=ok,^dead", "'^dead' is also topics.dead_letters=dead-letters" },
    { "topics.prompts=^pro(", "'^pro(' is no regular expression" },
    { "topics.prompts=,", "names no topic" },
    { "topics.dead_letters=..", "can't be a topic's name" },
    { "adapters.url=ftp://x/{adapter}", "must begin with http://, https:// or file://" },
    { "adapters.url=http://x/loras", "{adapter} is missing" },
    { "adapters.url=https://{adapter}.x/loras", "adapters.url=https://{adapter}.x/loras: {adapter} "
      "may not stand before the path" },
    { "replies.encoding=avro", "needs registry.url" },
    { "in_flight.max_messages=10", "less than intake.max_messages" },
    { "in_flight.max_messages=999", "in_flight.max_messages=999 is less than" },
    { "retry.backoff_max_ms=1", "less than retry.backoff_ms" },
    { "kafka.max.poll.interval.ms=6000", "more than half" },
    { "revoke.drain_ms=60001", "more than half of kafka.max.poll.interval.ms=120000" },
    { "traces.otlp_url=collector:4318", "must begin with http:// or https://" },
    { "traces.otlp_url=http://me:pass@collector/v1/traces", "put them into traces.auth_header" },
    { "traces.otlp_url=https:///me:pass@collector", "put them into traces.auth_header" },
    { "traces.otlp_url=http://pass@collector?x", "put them into traces.auth_header" },
    { "traces.otlp_url=me:pass@collector:4318", "put them into traces.auth_header" },
    { "traces.otlp_url=collector/@", "must begin with http:// or https://" },
    { "group.id=", "group.id may not be empty" },
};

static void test_check_refusals(void **state)
{
    for (size_t i = 0; i < LM_COUNT(check_rows); i++) {
        teardown(state);
        setup(state);
        bad_check(check_rows[i].set, check_rows[i].words);
    }
}

/* Each order would come back as a dead letter. */
static void test_patterns_and_orders(void **state)
{
    (void)state;
    good("topics.control=us-orders");
    bad_check("topics.prompts=^us-", "'^us-' is also topics.control=us-orders");
    good("topics.prompts=^us-prompts");
    assert_int_equal(config_check(&cfg, &err), LM_OK);
}

static void test_no_password_is_told(void **state)
{
    (void)state;
    bad_check("traces.otlp_url=http://me:hunter2@collector/v1/traces", "traces.auth_header");
    assert_null(strstr(err.msg, "hunter2"));
    bad_check("traces.otlp_url=me:hunter2@collector", "traces.auth_header");
    assert_null(strstr(err.msg, "hunter2"));
    good("traces.otlp_url=");
    bad_check("adapters.url=ftp://me:hunter2@store/{adapter}?sig=hunter2", "ftp://store/{adapter}");
    assert_null(strstr(err.msg, "hunter2"));
    bad_check("adapters.url=http://me:hunter2@store/", "adapters.url=http://store/: {adapter}");
    assert_null(strstr(err.msg, "hunter2"));
    good("adapters.url=");
    good("replies.too_large=claim");
    bad_check("replies.claim_url=http://me:hunter2@store/{object}", "replies.claim_auth_header");
    assert_null(strstr(err.msg, "hunter2"));
    bad_check("replies.claim_url=ftp://store/{object}?sig=hunter2", "ftp://store/{object}: must");
    assert_null(strstr(err.msg, "hunter2"));
}

static void test_claim_checks(void **state)
{
    (void)state;
    char longest[2100] = "replies.claim_url=http://x/{object}/";
    memset(longest + strlen(longest), 'x', 1950);
    good("replies.too_large=claim");
    bad_check("replies.claim_url=ftp://x/{object}", "must begin with http:// or https://");
    bad_check(longest, "replies.claim_url has more than 1900 bytes");
    bad_check("replies.claim_url=http://x/", "replies.claim_url=http://x/: {object} is missing");
    bad_check("replies.claim_url=http://{object}.x/", "{object} may not stand before the path");
    good("replies.claim_url=http://x/{object}");
    bad_check("replies.claim_s3_region=eu-1", "replies.claim_s3_secret go together");
    bad_check("replies.claim_s3_key=k", "replies.claim_s3_secret go together");
    good("replies.claim_s3_secret=s");
    assert_int_equal(config_check(&cfg, &err), LM_OK);
}

static void test_passthrough(void **state)
{
    (void)state;
    good("kafka.client.rack=a");
    good("kafka.consumer.client.rack=b");
    good("kafka.producer.linger.ms=7");
    good("kafka.client.id=x");
    assert_string_equal(config_kafka(&cfg, CONFIG_CONSUMER, "client.rack"), "b");
    assert_string_equal(config_kafka(&cfg, CONFIG_PRODUCER, "client.rack"), "a");
    assert_null(config_kafka(&cfg, CONFIG_CONSUMER, "linger.ms"));
    assert_string_equal(config_kafka(&cfg, CONFIG_PRODUCER, "linger.ms"), "7");
}

static const char *effective(enum config_scope scope, const char *key)
{
    static char value[256];
    size_t n = sizeof value;
    rd_kafka_conf_t *conf;
    if (kafka_conf_new(&cfg, scope, "me", &conf, &err))
        fail_msg("%s", err.msg);
    if (rd_kafka_conf_get(conf, key, value, &n) != RD_KAFKA_CONF_OK)
        snprintf(value, sizeof value, "?");
    rd_kafka_conf_destroy(conf);
    return value;
}

static void test_librdkafka_settings(void **state)
{
    (void)state;
    minimal();
    assert_string_equal(effective(CONFIG_CONSUMER, "enable.auto.commit"), "false");
    assert_string_equal(effective(CONFIG_CONSUMER, "enable.auto.offset.store"), "false");
    assert_string_equal(effective(CONFIG_CONSUMER, "partition.assignment.strategy"),
                        "cooperative-sticky");
    assert_string_equal(effective(CONFIG_CONSUMER, "group.id"), "loramill");
    assert_string_equal(effective(CONFIG_CONSUMER, "auto.offset.reset"), "smallest");
    assert_string_equal(effective(CONFIG_CONSUMER, "topic.metadata.refresh.interval.ms"), "10000");
    assert_string_equal(effective(CONFIG_PRODUCER, "topic.metadata.refresh.interval.ms"), "300000");
    assert_string_equal(effective(CONFIG_PRODUCER, "enable.idempotence"), "true");
    assert_string_equal(effective(CONFIG_PRODUCER, "acks"), "-1");
    assert_string_equal(effective(CONFIG_PRODUCER, "partitioner"), "murmur2_random");
    /* a dead letter has to go out however large its prompt was */
    assert_string_equal(effective(CONFIG_PRODUCER, "message.max.bytes"), "1000000000");
    good("kafka.topic.metadata.refresh.interval.ms=60000");
    assert_string_equal(effective(CONFIG_CONSUMER, "topic.metadata.refresh.interval.ms"), "60000");
    good("kafka.auto.offset.reset=latest");
    good("kafka.producer.compression.type=zstd");
    assert_string_equal(effective(CONFIG_CONSUMER, "auto.offset.reset"), "largest");
    assert_string_equal(effective(CONFIG_PRODUCER, "compression.codec"), "zstd");
}

static const char *transactional_id(void)
{
    static char value[512];
    static struct worker w;
    size_t n = sizeof value;
    rd_kafka_conf_t *conf;
    w.cfg = &cfg;
    worker_set_name(&w);
    if (kafka_conf_new(&cfg, CONFIG_PRODUCER, w.name, &conf, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(rd_kafka_conf_get(conf, "transactional.id", value, &n), RD_KAFKA_CONF_OK);
    rd_kafka_conf_destroy(conf);
    return value;
}

/* As in two containers of one pod: host name and process id are the same. */
static void test_workers_do_not_fence_each_other(void **state)
{
    (void)state;
    char first[512];
    minimal();
    good("delivery.mode=exactly-once");
    snprintf(first, sizeof first, "%s", transactional_id());
    assert_memory_equal(first, "loramill-", 9);
    assert_string_not_equal(transactional_id(), first);
    good("worker.name=a");
    assert_string_equal(transactional_id(), "loramill-a");
    good("transaction.id=b");
    assert_string_equal(transactional_id(), "b");
}

/* Offsets that a transaction is about to replace would be taken for the group's. */
static void test_exactly_once_reads_what_is_committed(void **state)
{
    (void)state;
    minimal();
    good("kafka.isolation.level=READ_UNCOMMITTED");
    assert_int_equal(kafka_conf_check(&cfg, &err), LM_OK);
    good("delivery.mode=exactly-once");
    assert_int_equal(kafka_conf_check(&cfg, &err), LM_INVALID);
    says("kafka.isolation.level=read_committed, not read_uncommitted");
    good("kafka.consumer.isolation.level=read_committed");
    assert_int_equal(kafka_conf_check(&cfg, &err), LM_OK);
    good("kafka.producer.isolation.level=read_uncommitted");    /* which it has no use for */
    assert_int_equal(kafka_conf_check(&cfg, &err), LM_OK);
}

/* Nor does one that goes on with another id: its name is nobody else's, however long. */
static void test_another_id(void **state)
{
    (void)state;
    static char set[3000] = "transaction.id=", id[3000];
    rd_kafka_conf_t *conf;
    minimal();
    good("delivery.mode=exactly-once");
    memset(set + strlen(set), 'x', 2000);
    good(set);
    assert_int_equal(kafka_conf_new(&cfg, CONFIG_PRODUCER, "w", &conf, &err), LM_OK);
    assert_int_equal(kafka_conf_other_id(conf, 1, &err), LM_OK);
    size_t n = sizeof id;
    assert_int_equal(rd_kafka_conf_get(conf, "transactional.id", id, &n), RD_KAFKA_CONF_OK);
    assert_int_equal(strlen(id), 2002);
    assert_memory_equal(id, strchr(set, '=') + 1, 2000);
    assert_string_equal(id + 2000, "~2");
    rd_kafka_conf_destroy(conf);
}

/* What the user sets makes no default of ours wrong. */
static void test_defaults_give_way(void **state)
{
    (void)state;
    minimal();
    good("intake.max_messages=100000");
    assert_int_equal(config_check(&cfg, &err), LM_OK);
    assert_int_equal(config_in_flight(&cfg), 100000);
    good("intake.max_messages=10");
    assert_int_equal(config_in_flight(&cfg), 8000);
    good("delivery.mode=exactly-once");
    assert_int_equal(config_in_flight(&cfg), 15000);
    good("transaction.max_messages=30000");
    assert_int_equal(config_in_flight(&cfg), 45000);
    good("transaction.max_messages=1");
    assert_int_equal(config_in_flight(&cfg), 8000);
    good("in_flight.max_messages=20");
    assert_int_equal(config_in_flight(&cfg), 20);
}

static void conf_refused(const char *assignment, const char *words, const char *never)
{
    rd_kafka_conf_t *conf;
    good(assignment);
    assert_int_equal(kafka_conf_new(&cfg, CONFIG_CONSUMER, "me", &conf, &err), LM_INVALID);
    says(words);
    if (never)
        assert_null(strstr(err.msg, never));
}

static void test_librdkafka_refusals(void **state)
{
    conf_refused("kafka.no.such.property=1", "kafka.no.such.property: librdkafka has no", NULL);
    teardown(state);
    setup(state);
    conf_refused("kafka.sasl.pasword=hunter2", "kafka.sasl.pasword", "hunter2");
    teardown(state);
    setup(state);
    conf_refused("kafka.session.timeout.ms=soon", "kafka.session.timeout.ms=soon", NULL);
    teardown(state);
    setup(state);
    conf_refused("kafka.ssl.key.no.such=hunter2", "kafka.ssl.key.no.such", "hunter2");
}

static void test_secrets(void **state)
{
    (void)state;
    assert_true(config_is_secret("registry.auth"));
    assert_true(config_is_secret("adapters.auth_header"));
    assert_true(config_is_secret("sasl.password"));
    assert_true(config_is_secret("ssl.key.pem"));
    assert_true(config_is_secret("sasl.oauthbearer.client.secret"));
    assert_true(config_is_secret("sasl.oauthbearer.config"));
    assert_false(config_is_secret("model.path"));
    assert_false(config_is_secret("bootstrap.servers"));
}

static void environment(const char *name, const char *value)
{
    assert_int_equal(value ? setenv(name, value, 1) : unsetenv(name), 0);
}

/* Where the cache and the journal are; never where anybody may plant an adapter, or a death. */
static void test_default_folders(void **state)
{
    (void)state;
    static const struct { const char *xdg, *home, *cache, *journal; } rows[] = {
        { "/x", "/h", "/x/loramill/adapters", "/x/loramill/journal" },
        { "x", "/h", "/h/.cache/loramill/adapters", "/h/.local/state/loramill/journal" },
        { NULL, "/h", "/h/.cache/loramill/adapters", "/h/.local/state/loramill/journal" },
        { NULL, NULL, "/var/cache/loramill/adapters", "/var/lib/loramill/journal" },
        { "", "", "/var/cache/loramill/adapters", "/var/lib/loramill/journal" },
        { NULL, "h", "/var/cache/loramill/adapters", "/var/lib/loramill/journal" },
    };
    static const char *const names[] = { "XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME" };
    char *kept[LM_COUNT(names)];
    for (size_t i = 0; i < LM_COUNT(names); i++)
        kept[i] = getenv(names[i]) ? strdup(getenv(names[i])) : NULL;
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        environment("XDG_CACHE_HOME", rows[i].xdg);
        environment("XDG_STATE_HOME", rows[i].xdg);
        environment("HOME", rows[i].home);
        char *cache = config_cache_dir(&cfg), *journal = config_journal_dir(&cfg);
        assert_string_equal(cache, rows[i].cache);
        assert_string_equal(journal, rows[i].journal);
        free(cache);
        free(journal);
    }
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        environment(names[i], kept[i]);
        free(kept[i]);
    }
}

static char seen[65536];

static void collect(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    (void)level;
    (void)component;
    size_t n = strlen(seen);
    snprintf(seen + n, sizeof seen - n, "%s\n", line);
}

static void test_log_hides_secrets(void **state)
{
    (void)state;
    good("kafka.sasl.password=hunter2");
    good("registry.auth=joe:hunter2");
    good("adapters.auth_header=Authorization: Bearer hunter2");
    good("adapters.url=http://me:hunter2@store/{adapter}?sig=hunter2");
    good("replies.claim_url=https://store/{object}?sig=hunter2");
    good("registry.url=http://me:hunter2@one, https://me:hunter2@two:8081");
    good("traces.otlp_url=hunter2@three");
    seen[0] = '\0';
    lm_log_set_sink(collect, NULL);
    lm_log_set_level(LM_DEBUG);
    config_log(&cfg);
    lm_log_set_level(LM_INFO);
    lm_log_set_sink(NULL, NULL);
    assert_non_null(strstr(seen, "kafka.sasl.password=[set]"));
    assert_non_null(strstr(seen, "topics.prompts=prompts"));
    assert_non_null(strstr(seen, "adapters.url=http://store/{adapter}"));
    assert_non_null(strstr(seen, "registry.url=http://one, https://two:8081"));
    assert_null(strstr(seen, "hunter2"));
}

/* ---- files ------------------------------------------------------------------------------ */

static char path[] = "/tmp/loramill-config-XXXXXX";

static lm_status read_text(const char *text, size_t n)
{
    char name[sizeof path];
    memcpy(name, path, sizeof path);
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, n), (ssize_t)n);
    close(fd);
    lm_status st = config_read_file(&cfg, name, &err);
    unlink(name);
    return st;
}

static void test_file(void **state)
{
    (void)state;
    static const char text[] = "# comment\n\n  ! also\nmodel.path = /m \r\nthreads=2\nthreads=3";
    assert_int_equal(read_text(text, sizeof text - 1), LM_OK);
    assert_string_equal(cfg.model_path, "/m");
    assert_int_equal(cfg.threads, 3);
}

static void test_file_errors_name_the_line(void **state)
{
    (void)state;
    static const char nul[] = "threads=1\nmodel.path=\0x\n";
    assert_int_equal(read_text("threads=1\nthread=2\n", 19), LM_INVALID);
    says(":2: unknown key 'thread'; did you mean 'threads'?");
    assert_int_equal(read_text(nul, sizeof nul - 1), LM_FORMAT);
    says(":2: holds a NUL");
    char *longer = malloc(70000);
    memset(longer, '#', 70000);
    assert_int_equal(read_text(longer, 70000), LM_TOO_LARGE);
    free(longer);
    assert_int_equal(config_read_file(&cfg, "/no/such/file", &err), LM_NOT_FOUND);
    says("/no/such/file");
}

/* The sample, with its comment signs taken off, must be a configuration. */
static void test_sample_is_valid(void **state)
{
    (void)state;
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);
    config_print_sample(f);
    fclose(f);
    int keys = 0;
    for (char *save = NULL, *line = strtok_r(text, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        if (line[0] == '#' && (line[1] == ' ' || !line[1]))
            continue;
        good(line + (line[0] == '#'));
        keys++;
    }
    free(text);
    assert_true(keys > 40);
    good("engine.mode=echo");
    assert_int_equal(config_check(&cfg, &err), LM_OK);
}

/* The files as they are now, then the same assignments; what is wrong in them is said. */
static void test_read_again(void **state)
{
    (void)state;
    char path[] = "/tmp/test_worker_config.XXXXXX";
    struct config fresh;
    close(mkstemp(path));
    write_file(path, "engine.mode=echo\nkafka.bootstrap.servers=b:1\nkafka.sasl.password=old\n"
                     "threads=2\n");
    assert_int_equal(config_read_file(&cfg, path, &err), LM_OK);
    good("threads=3");
    write_file(path, "engine.mode=echo\nkafka.bootstrap.servers=b:1\nkafka.sasl.password=new\n"
                     "threads=4\n");
    assert_int_equal(config_read_again(&cfg, &fresh, &err), LM_OK);
    assert_string_equal(config_kafka(&fresh, CONFIG_PRODUCER, "sasl.password"), "new");
    assert_string_equal(config_kafka(&cfg, CONFIG_PRODUCER, "sasl.password"), "old");
    assert_int_equal(fresh.threads, 3);
    config_release(&fresh);
    write_file(path, "engine.mode=echo\nno.such.key=1\n");
    assert_int_equal(config_read_again(&cfg, &fresh, &err), LM_INVALID);
    says(":2: unknown key");
    config_release(&fresh);
    remove(path);
    assert_int_equal(config_read_again(&cfg, &fresh, &err), LM_NOT_FOUND);
    config_release(&fresh);
}

/* As -c and --set give them: later files over earlier ones, assignments over all. */
static void test_settings_of_the_command_line(void **state)
{
    (void)state;
    char one[] = "/tmp/test_worker_config.XXXXXX", two[] = "/tmp/test_worker_config.XXXXXX";
    struct cli_settings s = { 0 };
    struct config c;
    close(mkstemp(one));
    close(mkstemp(two));
    write_file(one, "group.id=one\nthreads=2\nbackend=cpu\n");
    write_file(two, "group.id=two\nthreads=3\n");
    assert_int_equal(cli_settings_add(&s, "threads=4", &err), LM_OK);
    assert_int_equal(cli_settings_file(&s, one, &err), LM_OK);
    assert_int_equal(cli_settings_file(&s, two, &err), LM_OK);
    assert_int_equal(cli_settings_load(&s, &c, &err), LM_OK);
    assert_string_equal(c.group_id, "two");
    assert_string_equal(c.backend, "cpu");
    assert_int_equal(c.threads, 4);
    config_release(&c);
    assert_int_equal(cli_settings_add(&s, "thread=4", &err), LM_OK);
    assert_int_equal(cli_settings_load(&s, &c, &err), LM_INVALID);
    says("--set number 2: unknown key 'thread'");
    while (s.n_files < CLI_MAX_FILES)
        assert_int_equal(cli_settings_file(&s, two, &err), LM_OK);
    assert_int_equal(cli_settings_file(&s, two, &err), LM_TOO_LARGE);
    remove(one);
    remove(two);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

/* --check, the consumer and the tools take the same list apart, by the same function. */
static void test_prompt_topics(void **state)
{
    (void)state;
    static const char *const all[] = { "a", "b", "c", "^x[y z]", "d" };
    minimal();
    good("topics.prompts=a,\tb ,, c,^x[y z],\fd,");
    assert_int_equal(config_check(&cfg, &err), LM_OK);
    char *copy = strdup(cfg.topics_prompts), *rest = copy, *t;
    for (size_t i = 0; i < LM_COUNT(all); i++) {
        assert_non_null(t = config_next_topic(&rest));
        assert_string_equal(t, all[i]);
    }
    assert_null(config_next_topic(&rest));
    free(copy);
    assert_true(config_reads_topic(&cfg, "b"));
    assert_true(config_reads_topic(&cfg, "xz"));
    assert_false(config_reads_topic(&cfg, "z]"));
    bad_check("topics.prompts=a b", "holds ' '");
    bad_check("topics.prompts= ,\t,", "names no topic");
}

static void test_topic_priorities(void **state)
{
    (void)state;
    struct config c;
    struct lm_err err;
    assert_int_equal(config_init(&c, &err), LM_OK);
    assert_int_equal(config_set(&c, "kafka.bootstrap.servers=b:1", &err), LM_OK);
    assert_int_equal(config_set(&c, "engine.mode=echo", &err), LM_OK);
    assert_int_equal(config_set(&c, "topics.priorities=urgent=10,\tbulk=-5\t, x=1", &err), LM_OK);
    assert_int_equal(config_check(&c, &err), LM_OK);
    assert_int_equal(config_topic_priority(&c, "urgent"), 10);
    assert_int_equal(config_topic_priority(&c, "bulk"), -5);
    assert_int_equal(config_topic_priority(&c, "x"), 1);
    assert_int_equal(config_topic_priority(&c, "bul"), 0);
    static const char *const bad[] = { "urgent", "urgent=", "urgent=x", "=3", "a=1;b=2",
                                       "a=1000001", "a=99999999999999999999" };
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        char line[128];
        snprintf(line, sizeof line, "topics.priorities=%s", bad[i]);
        assert_int_equal(config_set(&c, line, &err), LM_OK);
        assert_int_equal(config_check(&c, &err), LM_INVALID);
        assert_non_null(strstr(err.msg, "topics.priorities"));
    }
    config_release(&c);
}

/* ---- what is documented ------------------------------------------------------------------- */

/* Ours by the second of these names, a dump's by the first. */
static const char *known_as(const char *name)
{
    static const char *const names[][2] = {
        { "compression.codec", "compression.type" }, { "smallest", "earliest" },
        { "message.timeout.ms", "delivery.timeout.ms" },
    };
    for (size_t i = 0; i < LM_COUNT(names); i++)
        if (!strcmp(name, names[i][0]))
            return names[i][1];
    return name;
}

/* Of what is not the worker's own, nor another in each, nor a pointer. */
static bool is_default(const char *key, const char *value)
{
    int n;
    const struct config_owned *o = config_owned(&n);
    for (int i = 0; i < n; i++)
        if (!strcmp(key, o[i].key))
            return false;
    return strcmp(key, "client.id") && strncmp(value, "0x", 2);
}

static bool is_told(const char *doc, const char *key, const char *value)
{
    char name[128], quoted[128];
    static const char *const scopes[] = { "", "consumer.", "producer." };
    snprintf(quoted, sizeof quoted, "`%s`", value);
    for (size_t i = 0; i < LM_COUNT(scopes); i++) {
        snprintf(name, sizeof name, "\n| `kafka.%s%s` |", scopes[i], key);
        const char *row = strstr(doc, name), *at = row ? strstr(row, quoted) : NULL;
        if (at && at < strchr(row + 1, '\n'))
            return true;
    }
    return false;
}

/* A dump leaves out what has no value. Topics have properties of their own. */
static void all_are_told(const char *doc, const char **ours, size_t n, bool of_topics)
{
    char plain[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_topic_conf_t *topic = rd_kafka_topic_conf_new();
    for (size_t i = 0; i + 1 < n; i += 2) {
        size_t size = sizeof plain;
        const char *key = known_as(ours[i]), *value = known_as(ours[i + 1]);
        rd_kafka_conf_res_t got = of_topics ? rd_kafka_topic_conf_get(topic, key, plain, &size)
                                            : rd_kafka_conf_get(conf, key, plain, &size);
        bool same = got == RD_KAFKA_CONF_OK && !strcmp(plain, ours[i + 1]);
        if (!same && is_default(key, value) && !is_told(doc, key, value))
            fail_msg("docs/configuration.md lacks kafka.%s=%s", key, value);
    }
    rd_kafka_conf_dump_free(ours, n);
    rd_kafka_topic_conf_destroy(topic);
    rd_kafka_conf_destroy(conf);
}

static void compare(const char *doc, enum config_scope scope)
{
    rd_kafka_conf_t *ours;
    size_t n;
    assert_int_equal(kafka_conf_new(&cfg, scope, "w", &ours, &err), LM_OK);
    const char **dump = rd_kafka_conf_dump(ours, &n);
    all_are_told(doc, dump, n, false);
    dump = rd_kafka_topic_conf_dump(rd_kafka_conf_get_default_topic_conf(ours), &n);
    all_are_told(doc, dump, n, true);
    rd_kafka_conf_destroy(ours);
}

static void test_our_defaults_are_documented(void **state)
{
    static const char *const modes[] = { "at-least-once", "exactly-once" };
    char *doc = NULL, mode[64];
    size_t len;
    (void)state;
    FILE *f = open_memstream(&doc, &len);
    config_print_markdown(f);
    fclose(f);
    for (size_t i = 0; i < LM_COUNT(modes); i++) {
        snprintf(mode, sizeof mode, "delivery.mode=%s", modes[i]);
        good(mode);
        compare(doc, CONFIG_CONSUMER);
        compare(doc, CONFIG_PRODUCER);
    }
    free(doc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topic_priorities), TEST(test_prompt_topics), TEST(test_read_again),
        TEST(test_settings_of_the_command_line),
        TEST(test_defaults), TEST(test_types), TEST(test_refusals), TEST(test_owned_are_refused),
        TEST(test_checks), TEST(test_check_refusals), TEST(test_patterns_and_orders),
        TEST(test_no_password_is_told),
        TEST(test_claim_checks), TEST(test_passthrough),
        TEST(test_librdkafka_settings), TEST(test_defaults_give_way),
        TEST(test_workers_do_not_fence_each_other),
        TEST(test_exactly_once_reads_what_is_committed), TEST(test_another_id),
        TEST(test_librdkafka_refusals), TEST(test_secrets), TEST(test_default_folders),
        TEST(test_log_hides_secrets), TEST(test_file), TEST(test_file_errors_name_the_line),
        TEST(test_sample_is_valid), TEST(test_our_defaults_are_documented),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
