/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_store.c - the adapter store against a hostile HTTP server, with an engine of our own.
 *
 * The engine's side is a table that remembers what it was asked to load, with the weights' hash, so
 * that every success is a success with the right bytes. Each test has a cache folder of its own.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <cmocka.h>

#include "hostile_adapters.h"
#include "worker/log.h"
#include "worker/store/store_int.h"

#define WAIT_S 20

/* ---- the engine's side ------------------------------------------------------------------ */

struct engine_adapter { char id[ENGINE_ADAPTER_ID_MAX + 1]; uint64_t hash; atomic_int refs; };

static struct {
    pthread_mutex_t lock;
    struct engine_adapter *held[64];
    int n, loads;
    lm_status refuse;           /* what the next loads say */
    int refusals;               /* how many of them; -1: all */
    atomic_bool block;
} host = { .lock = PTHREAD_MUTEX_INITIALIZER };

static engine_adapter *host_find(engine *e, const char *id)
{
    (void)e;
    struct engine_adapter *found = NULL;
    pthread_mutex_lock(&host.lock);
    for (int i = 0; i < host.n; i++)
        if (!strcmp(host.held[i]->id, id))
            found = host.held[i];
    if (found)
        found->refs++;
    pthread_mutex_unlock(&host.lock);
    return found;
}

static engine_adapter *host_ref(engine_adapter *a)
{
    a->refs++;
    return a;
}

static void host_unref(engine_adapter *a)
{
    a->refs--;
}

static uint64_t hash_file(const char *folder, const char *name)
{
    char path[4096];
    static char buf[1 << 20];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDONLY);
    ssize_t n = fd >= 0 ? read(fd, buf, sizeof buf) : -1;
    if (fd >= 0)
        close(fd);
    return n < 0 ? 0 : hash_bytes(buf, (size_t)n);
}

static lm_status host_load(engine *e, const char *id, const char *dir, engine_adapter **out,
                           struct lm_err *err)
{
    (void)e;
    while (host.block)
        usleep(1000);
    pthread_mutex_lock(&host.lock);
    host.loads++;
    lm_status st = LM_OK;
    if (host.refusals != 0) {
        host.refusals -= host.refusals > 0;
        st = lm_err_set(err, host.refuse, "the engine refuses '%s'", id);
    } else {
        struct engine_adapter *a = calloc(1, sizeof *a);
        snprintf(a->id, sizeof a->id, "%s", id);
        a->hash = hash_file(dir, CACHE_WEIGHTS);
        a->refs = 1;
        host.held[host.n++] = a;
        *out = a;
    }
    pthread_mutex_unlock(&host.lock);
    return st;
}

static void host_reset(void)
{
    for (int i = 0; i < host.n; i++)
        free(host.held[i]);
    host.n = host.loads = host.refusals = 0;
    host.block = false;
}

static const struct store_hooks hooks = { host_find, host_load, host_ref, host_unref, 5 };

/* ---- a test's surroundings -------------------------------------------------------------- */

struct fix {
    struct site *site;
    char dir[64], url[128];
    store *s;
};

struct answer {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int calls;
    lm_status status;
    struct lm_err err;
    engine_adapter *a;
};

static int remove_one(const char *path, const struct stat *sb, int type, struct FTW *ftw)
{
    (void)sb, (void)type, (void)ftw;
    return remove(path);
}

static int setup(void **state)
{
    struct fix *f = calloc(1, sizeof *f);
    snprintf(f->dir, sizeof f->dir, "/tmp/loramill-store-XXXXXX");
    if (!mkdtemp(f->dir))
        return -1;
    f->site = site_open(rules);
    snprintf(f->url, sizeof f->url, "http://127.0.0.1:%d/{adapter}", f->site->port);
    host_reset();
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    store_free(f->s);
    site_close(f->site);
    nftw(f->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    host_reset();
    free(f);
    return 0;
}

static struct store_config base_config(struct fix *f)
{
    return (struct store_config){ .url = f->url, .cache_dir = f->dir, .max_adapter_bytes = 1000000,
                                  .max_attempts = 5, .connect_timeout_ms = 10000,
                                  .stall_timeout_ms = 10000, .negative_ttl_ms = 60000 };
}

static store *open_store(struct fix *f, const struct store_config *cfg)
{
    struct lm_err err = { 0 };
    struct store_config base = base_config(f);
    store_free(f->s);
    lm_status st = store_new_with(cfg ? cfg : &base, &hooks, &f->s, &err);
    if (st != LM_OK)
        fail_msg("store_new: %s", err.msg);
    return f->s;
}

static void on_done(void *user, lm_status status, engine_adapter *a, const struct lm_err *err)
{
    struct answer *w = user;
    pthread_mutex_lock(&w->lock);
    w->calls++;
    w->status = status;
    w->a = a;
    if (err)
        w->err = *err;
    pthread_cond_broadcast(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

static void answer_init(struct answer *w)
{
    memset(w, 0, sizeof *w);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->cond, NULL);
}

static void await(struct answer *w, int calls)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    int rc = 0;
    pthread_mutex_lock(&w->lock);
    while (w->calls < calls && rc == 0)
        rc = pthread_cond_timedwait(&w->cond, &w->lock, &until);
    int got = w->calls;
    pthread_mutex_unlock(&w->lock);
    assert_int_equal(got, calls);
}

static struct answer get(struct fix *f, const char *id)
{
    struct answer w;
    answer_init(&w);
    if (!f->s)
        open_store(f, NULL);
    store_get(f->s, id, on_done, &w);
    await(&w, 1);
    return w;
}

static void expect_blob(struct fix *f, const char *id, const struct blob *b)
{
    struct answer w = get(f, id);
    if (w.status != LM_OK)
        fail_msg("%s: %s", id, w.err.msg);
    assert_non_null(w.a);
    assert_true(w.a->hash == b->hash);
}

static void expect_error(struct fix *f, const char *id, lm_status status, const char *part)
{
    struct answer w = get(f, id);
    if (w.status != status)
        fail_msg("%s: expected %s, got %s: %s", id, lm_status_wire(status),
                 lm_status_wire(w.status), w.status ? w.err.msg : "ok");
    assert_null(w.a);
    if (!strstr(w.err.msg, part))
        fail_msg("%s: \"%s\" does not say \"%s\"", id, w.err.msg, part);
}

static int hits(struct fix *f, const char *path)
{
    return site_count(f->site, path, 0);
}

static int entries(const char *path)
{
    DIR *d = opendir(path);
    int n = 0;
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* The installed folder of an id, as the cache has it. */
static char *folder_of(struct fix *f, const char *id)
{
    cache *c;
    assert_int_equal(cache_open(f->dir, f->url, &c, NULL), LM_OK);
    char *path = cache_path(c, id);
    cache_close(c);
    return path;
}

static bool installed(struct fix *f, const char *id)
{
    struct stat sb;
    char *path = folder_of(f, id);
    bool is = stat(path, &sb) == 0;
    free(path);
    return is;
}

/* ---- the good cases --------------------------------------------------------------------- */

static void test_fetch_install_load(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    expect_blob(f, "good", &weights);
    store_stats(f->s, &st);
    assert_int_equal(st.fetched, 1);
    assert_int_equal(st.fetched_bytes, weights.len + sizeof config_text - 1);
    assert_int_equal(st.in_flight, 0);
    char *path = folder_of(f, "good"), cmd[4200];
    snprintf(cmd, sizeof cmd, "cd %s && sha256sum --quiet --strict -c SHA256SUMS", path);
    assert_int_equal(system(cmd), 0);
    free(path);
}

static void test_memory_hit(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    expect_blob(f, "good", &weights);
    expect_blob(f, "good", &weights);
    store_stats(f->s, &st);
    assert_int_equal(st.memory_hits, 1);
    assert_int_equal(f->site->total, 2);
    assert_int_equal(host.loads, 1);
}

static void test_disk_hit_without_server(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    expect_blob(f, "good", &weights);
    host_reset();
    open_store(f, NULL);
    expect_blob(f, "good", &weights);
    store_stats(f->s, &st);
    assert_int_equal(st.disk_hits, 1);
    assert_int_equal(st.fetched, 0);
    assert_int_equal(f->site->total, 2);
}

/* Somebody removes the cache's folders while the worker runs. */
static void test_emptied_cache_is_made_again(void **state)
{
    struct fix *f = *state;
    char command[128];
    expect_blob(f, "good", &weights);
    snprintf(command, sizeof command, "rm -rf %s", f->dir);
    assert_int_equal(system(command), 0);
    host_reset();
    expect_blob(f, "good", &weights);
    snprintf(command, sizeof command, "test -n \"$(ls %s/tmp)\"", f->dir);
    assert_int_equal(system(command), 0);
}

static void test_single_flight(void **state)
{
    struct fix *f = *state;
    struct answer w;
    answer_init(&w);
    open_store(f, NULL);
    for (int i = 0; i < 50; i++)
        store_get(f->s, "slow", on_done, &w);
    await(&w, 50);
    assert_int_equal(w.status, LM_OK);
    assert_int_equal(w.a->refs, 50);
    assert_int_equal(f->site->total, 2);
    assert_int_equal(host.loads, 1);
}

static void test_nested_ids_are_apart(void **state)
{
    struct fix *f = *state;
    char longest[ENGINE_ADAPTER_ID_MAX + 1], sibling[ENGINE_ADAPTER_ID_MAX + 1];
    memset(longest, 'a', sizeof longest - 1);
    memcpy(longest, "good/", 5);
    longest[sizeof longest - 1] = '\0';
    memcpy(sibling, longest, sizeof sibling);
    sibling[255] = 'b';
    const char *ids[] = { "brand", "brand/voice", "brand/voice/x", longest, sibling };
    for (size_t i = 0; i < LM_COUNT(ids); i++)
        expect_blob(f, ids[i], &weights);
    for (size_t i = 0; i < LM_COUNT(ids); i++) {
        char *a = folder_of(f, ids[i]);
        assert_int_equal(entries(a), 3);
        for (size_t j = 0; j < i; j++) {
            char *b = folder_of(f, ids[j]);
            assert_string_not_equal(a, b);
            free(b);
        }
        free(a);
    }
}

static void test_other_requests_go_on(void **state)
{
    struct fix *f = *state;
    struct answer w;
    expect_blob(f, "good", &weights);
    answer_init(&w);
    host.block = true;
    store_get(f->s, "brand", on_done, &w);
    for (int i = 0; i < WAIT_S * 1000 && hits(f, "/brand/" CACHE_WEIGHTS) == 0; i++)
        usleep(1000);
    expect_blob(f, "good", &weights);           /* memory */
    expect_error(f, "nobody", LM_NOT_FOUND, "404");  /* network */
    assert_int_equal(w.calls, 0);
    host.block = false;
    await(&w, 1);
    assert_int_equal(w.status, LM_OK);
}

static void test_local_folder(void **state)
{
    struct fix *f = *state;
    char path[256], url[256];
    const char *dirs[] = { "l", "l/brand", "l/brand/voice" };
    for (size_t i = 0; i < LM_COUNT(dirs); i++) {
        snprintf(path, sizeof path, "%s/%s", f->dir, dirs[i]);
        assert_int_equal(mkdir(path, 0700), 0);
        snprintf(path, sizeof path, "%s/%s/" CACHE_WEIGHTS, f->dir, dirs[i]);
        FILE *out = fopen(path, "w");
        fwrite(weights.bytes, 1, weights.len, out);
        fclose(out);
    }
    snprintf(path, sizeof path, "%s/l", f->dir);
    snprintf(url, sizeof url, "file://%s/l/{adapter}", f->dir);
    struct store_config cfgs[] = { { .local_dir = path }, { .url = url } };
    for (size_t i = 0; i < LM_COUNT(cfgs); i++) {
        open_store(f, &cfgs[i]);
        expect_blob(f, "brand/voice", &weights);
        expect_blob(f, "brand", &weights);
        expect_error(f, "brand/other", LM_NOT_FOUND, "adapter 'brand/other': not in the folder");
        host_reset();
    }
    assert_int_equal(f->site->total, 0);
}

static void test_query_in_template(void **state)
{
    struct fix *f = *state;
    char url[160];
    struct store_config cfg = base_config(f);
    snprintf(url, sizeof url, "http://127.0.0.1:%d/{adapter}?sig=1", f->site->port);
    cfg.url = url;
    open_store(f, &cfg);
    expect_blob(f, "signed", &weights);
}

/* ---- refusals --------------------------------------------------------------------------- */

static void test_not_found_is_remembered(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    struct store_config cfg = base_config(f);
    cfg.negative_ttl_ms = 300;
    open_store(f, &cfg);
    for (int i = 0; i < 10; i++)
        expect_error(f, "nobody", LM_NOT_FOUND, "HTTP 404");
    store_stats(f->s, &st);
    assert_int_equal(st.negative_hits, 9);
    assert_int_equal(f->site->total, 1);
    usleep(350000);
    expect_error(f, "nobody", LM_NOT_FOUND, "HTTP 404");
    assert_int_equal(f->site->total, 2);
}

static void test_not_found_is_remembered_no_longer_than_asked(void **state)
{
    struct fix *f = *state;
    struct store_config cfg = base_config(f);
    cfg.negative_ttl_ms = 0;
    open_store(f, &cfg);
    for (int i = 0; i < 3; i++)
        expect_error(f, "nobody", LM_NOT_FOUND, "HTTP 404");
    assert_int_equal(f->site->total, 3);
}

static void test_final_codes(void **state)
{
    struct fix *f = *state;
    expect_error(f, "forbidden", LM_DENIED, "HTTP 403");
    expect_error(f, "gone", LM_NOT_FOUND, "HTTP 410");
    expect_error(f, "teapot", LM_INVALID, "HTTP 418");
    assert_int_equal(f->site->total, 3);
}

static void test_bad_ids_ask_nobody(void **state)
{
    struct fix *f = *state;
    static const char *const ids[] = { "", "..", "../good", "good/..", "good//x", "/good", "good/",
                                       "go od", "good%2f", "good?x", "good#", ".good", "good\n",
                                       "http://evil/", "good\\x", "{adapter}" };
    for (size_t i = 0; i < LM_COUNT(ids); i++)
        expect_error(f, ids[i], LM_INVALID, "");
    assert_int_equal(f->site->total, 0);
}

static void test_bad_settings(void **state)
{
    struct fix *f = *state;
    static const struct { const char *url, *auth, *ca, *says; } bad[] = {
        { "http://h/adapter", NULL, NULL, "{adapter}" },
        { "ftp://h/{adapter}", NULL, NULL, "must begin with" },
        { "{adapter}", NULL, NULL, "must begin with" },
        { "file://other-host/x/{adapter}", NULL, NULL, "file URL" },
        { "http://h/{adapter}", "X-Api-Key: 1", NULL, "Authorization" },
        { "http://h/{adapter}", "Authorization: a\r\nX: b", NULL, "one line" },
        { "https://h/{adapter}", NULL, "/nonexistent.pem", "ca_file" },
    };
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        struct lm_err err = { 0 };
        store *s;
        struct store_config cfg = base_config(f);
        cfg.url = bad[i].url;
        cfg.auth_header = bad[i].auth;
        cfg.ca_file = bad[i].ca;
        assert_int_equal(store_new_with(&cfg, &hooks, &s, &err), LM_INVALID);
        assert_null(s);
        if (!strstr(err.msg, bad[i].says))
            fail_msg("\"%s\" does not say \"%s\"", err.msg, bad[i].says);
    }
}

static void test_unusable_cache_folder(void **state)
{
    struct fix *f = *state;
    struct lm_err err = { 0 };
    store *s;
    struct store_config cfg = base_config(f);
    cfg.cache_dir = "/proc/nothing/here";
    assert_int_equal(store_new_with(&cfg, &hooks, &s, &err), LM_IO);
    assert_non_null(strstr(err.msg, "/proc/nothing"));
}

static void test_engine_refuses(void **state)
{
    struct fix *f = *state;
    host.refuse = LM_UNSUPPORTED;
    host.refusals = -1;
    expect_error(f, "good", LM_UNSUPPORTED, "the engine refuses 'good'");
    assert_int_equal(host.loads, 1);
    assert_false(installed(f, "good"));
    expect_error(f, "good", LM_UNSUPPORTED, "the engine refuses 'good'");
    assert_int_equal(host.loads, 1);    /* from the negative cache */
}

static void test_engine_has_no_room(void **state)
{
    struct fix *f = *state;
    host.refuse = LM_NOMEM;
    host.refusals = 1;
    expect_error(f, "good", LM_NOMEM, "the engine refuses");
    assert_true(installed(f, "good"));
    expect_blob(f, "good", &weights);   /* not remembered, and not fetched again */
    assert_int_equal(f->site->total, 2);
}

/* ---- retries and ranges ----------------------------------------------------------------- */

static void test_retry_after(void **state)
{
    struct fix *f = *state;
    int64_t began = lm_now_us();
    struct store_config cfg = base_config(f);
    open_store(f, &cfg);
    expect_blob(f, "busy", &weights);
    assert_true(lm_now_us() - began >= 2000000);    /* once for each file */
}

static void test_retry_408_429(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    expect_blob(f, "hasty", &weights);
    store_stats(f->s, &st);
    assert_int_equal(st.retries, 4);
}

/* Of files that are being fetched into the cache. */
static int open_files(const struct fix *f)
{
    char link[300], path[PATH_MAX];
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        snprintf(link, sizeof link, "/proc/self/fd/%s", e->d_name);
        ssize_t len = readlink(link, path, sizeof path - 1);
        path[LM_MAX(len, 0)] = '\0';
        n += !strncmp(path, f->dir, strlen(f->dir)) && strstr(path, CACHE_CONFIG);
    }
    closedir(d);
    return n;
}

static void quiet(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx, (void)level, (void)component, (void)line;
}

static atomic_int lines;        /* that an operator sees */

static void count_lines(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx, (void)component, (void)line;
    atomic_fetch_add(&lines, level <= LM_INFO);
}

/* What waits for its next attempt holds no descriptor: the process has a thousand, mostly. Nor has
 * each of them lines of its own. */
static void test_waiting_costs_little(void **state)
{
    enum { N = 60 };            /* the engine's side holds no more */
    struct fix *f = *state;
    struct store_stats st = { 0 };
    struct store_config cfg = base_config(f);
    struct answer w;
    char id[16];
    cfg.concurrency = 4;
    cfg.stall_timeout_ms = WAIT_S * 1000;
    answer_init(&w);
    atomic_store(&lines, 0);
    lm_log_set_sink(count_lines, NULL);
    open_store(f, &cfg);
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "busy/%d", i);
        store_get(f->s, id, on_done, &w);
    }
    while (st.retries < N) {
        usleep(1000);
        store_stats(f->s, &st);
        assert_true(open_files(f) <= cfg.concurrency);
    }
    await(&w, N);
    lm_log_set_sink(quiet, NULL);
    assert_int_equal(w.status, LM_OK);
    assert_int_equal(host.n, N);
    assert_in_range(atomic_load(&lines), 1, 1 + WAIT_S / LOG_SELDOM_S);
}

static void test_gives_up(void **state)
{
    struct fix *f = *state;
    expect_error(f, "broken", LM_NET, "HTTP 500 (gave up after 5 attempts)");
    assert_int_equal(f->site->total, 5);
    expect_error(f, "broken", LM_NET, "HTTP 500");
    assert_int_equal(f->site->total, 10);       /* an outage is not remembered */
}

static void test_connection_refused(void **state)
{
    struct fix *f = *state;
    struct store_config cfg = base_config(f);
    cfg.url = "http://127.0.0.1:1/{adapter}";
    open_store(f, &cfg);
    expect_error(f, "good", LM_NET, "gave up after 5 attempts");
}

static void test_resume(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    struct store_config cfg = base_config(f);
    cfg.max_attempts = 6;
    open_store(f, &cfg);
    expect_blob(f, "cut", &weights);
    store_stats(f->s, &st);
    assert_true(st.fetched_bytes <= weights.len + sizeof config_text);   /* nothing came twice */
    assert_true(hits(f, "/cut/" CACHE_WEIGHTS) >= 4);
}

static void test_no_resume_without_strong_validator(void **state)
{
    expect_blob(*state, "bare", &weights);
    expect_blob(*state, "weak", &weights);
}

static void test_changed_between_attempts(void **state)
{
    expect_blob(*state, "changed", &weights2);
    expect_blob(*state, "spliced", &weights2);
}

static void test_lying_content_range(void **state)
{
    char id[16];
    for (int i = 0; i < 6; i++) {
        snprintf(id, sizeof id, "lying/%d", i);
        expect_blob(*state, id, &weights);
    }
}

static void test_416_starts_over(void **state)
{
    expect_blob(*state, "r416", &weights);
}

static void test_unasked_part(void **state)
{
    expect_error(*state, "unasked", LM_NET, "though the whole was asked for");
}

static void test_short_body(void **state)
{
    expect_error(*state, "short", LM_NET, "gave up after 5 attempts");
}

/* ---- sizes, silence, nonsense ----------------------------------------------------------- */

static void test_too_large(void **state)
{
    struct fix *f = *state;
    expect_error(f, "huge", LM_TOO_LARGE, "99999999999 bytes, more than the");
    expect_error(f, "chunked", LM_TOO_LARGE, "more than the");
    expect_error(f, "huge-config", LM_TOO_LARGE, "2000000 bytes");
    assert_int_equal(hits(f, "/huge/" CACHE_WEIGHTS), 1);
}

static void test_silence_and_trickle(void **state)
{
    struct fix *f = *state;
    struct store_config cfg = base_config(f);
    cfg.max_attempts = 2;
    cfg.stall_timeout_ms = 200;
    open_store(f, &cfg);
    int64_t began = lm_now_us();
    expect_error(f, "silent", LM_NET, "fewer than 4096 bytes in 200 ms");
    expect_error(f, "trickle", LM_NET, "fewer than 4096 bytes in 200 ms");
    assert_true(lm_now_us() - began < 15000000);        /* a trickle of 20 ms a byte has no end */
}

static void test_not_an_adapter(void **state)
{
    struct fix *f = *state;
    expect_error(f, "html", LM_FORMAT, CACHE_CONFIG ": not a JSON object");
    expect_error(f, "page", LM_FORMAT, "not a safetensors file");
    expect_error(f, "closing", LM_FORMAT, "its header says 300000");
    expect_error(f, "gzip", LM_UNSUPPORTED, "Content-Encoding gzip");
    assert_int_equal(host.loads, 0);
    assert_false(installed(f, "html"));
    assert_false(installed(f, "closing"));
}

static void test_nonsense_protocol(void **state)
{
    expect_error(*state, "headers", LM_NET, "bytes of headers");
    expect_error(*state, "garbage", LM_NET, "gave up");
}

static void test_redirects(void **state)
{
    struct fix *f = *state;
    expect_blob(f, "moved", &weights);
    expect_error(f, "to-file", LM_DENIED, "another protocol");
    expect_error(f, "loop", LM_INVALID, "redirected more than 5 times");
}

static void test_credentials_stay_home(void **state)
{
    struct fix *f = *state;
    struct store_config cfg = base_config(f);
    cfg.auth_header = "Authorization: Bearer secret";
    open_store(f, &cfg);
    expect_blob(f, "auth", &weights);
    assert_string_equal(seen_authorization[0], "Bearer secret");
    assert_string_equal(seen_authorization[1], "");
}

static void test_messages_hide_credentials(void **state)
{
    struct fix *f = *state;
    char url[160];
    struct store_config cfg = base_config(f);
    snprintf(url, sizeof url, "http://me:hunter2@127.0.0.1:%d/{adapter}?sig=hunter3",
             f->site->port);
    cfg.url = url;
    open_store(f, &cfg);
    struct answer w = get(f, "nobody");
    assert_int_equal(w.status, LM_NOT_FOUND);
    assert_null(strstr(w.err.msg, "hunter"));
    assert_non_null(strstr(w.err.msg, "/nobody/" CACHE_CONFIG));
}

static void test_a_file_url_hides_them_too(void **state)
{
    struct fix *f = *state;
    struct store_config cfg = base_config(f);
    struct lm_err err;
    store *s;
    cfg.url = "file://me:hunter2@elsewhere/{adapter}";
    assert_int_equal(store_new(&cfg, &s, &err), LM_INVALID);
    assert_null(strstr(err.msg, "hunter2"));
    assert_non_null(strstr(err.msg, "file://elsewhere/{adapter}"));
}

/* ---- damage ----------------------------------------------------------------------------- */

static void damage(struct fix *f, const char *id, const char *name, long at)
{
    char *folder = folder_of(f, id), path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (at < 0) {
        assert_int_equal(unlink(path), 0);
    } else {
        int fd = open(path, O_WRONLY);
        assert_true(fd >= 0 && pwrite(fd, "!", 1, at) == 1);
        close(fd);
    }
    free(folder);
}

static void test_damage_heals(void **state)
{
    struct fix *f = *state;
    static const struct { const char *file; long at; } harm[] = {
        { CACHE_WEIGHTS, 150000 }, { CACHE_WEIGHTS, -1 }, { CACHE_CONFIG, 0 },
        { CACHE_SUMS, 3 }, { CACHE_SUMS, -1 },
    };
    expect_blob(f, "good", &weights);
    for (size_t i = 0; i < LM_COUNT(harm); i++) {
        damage(f, "good", harm[i].file, harm[i].at);
        host_reset();
        expect_blob(f, "good", &weights);
        assert_int_equal(host.loads, 1);        /* the damaged copy never got there */
        assert_int_equal(f->site->total, (int)(4 + 2 * i));
    }
}

static void test_bad_copy_is_fetched_once_more_only(void **state)
{
    struct fix *f = *state;
    expect_blob(f, "good", &weights);
    host_reset();
    host.refuse = LM_FORMAT;
    host.refusals = -1;
    expect_error(f, "good", LM_FORMAT, "the engine refuses");
    assert_int_equal(host.loads, 2);
    assert_int_equal(f->site->total, 4);
    assert_false(installed(f, "good"));
}

/* ---- several processes ------------------------------------------------------------------ */

/* What main() does when it is called as a child: gets one adapter, exits 0 when it is right. */
static int child_main(const char *dir, const char *url, const char *id)
{
    struct answer w;
    struct fix f = { 0 };
    store *s = NULL;
    struct store_config cfg = base_config(&f);
    cfg.cache_dir = dir;
    cfg.url = url;
    answer_init(&w);
    if (store_new_with(&cfg, &hooks, &s, NULL) != LM_OK)
        return 2;
    store_get(s, id, on_done, &w);
    await(&w, 1);
    bool right = w.status == LM_OK && w.a->hash == weights.hash;
    store_free(s);
    host_reset();
    return right ? 0 : 1;
}

static pid_t spawn_get(struct fix *f, const char *id)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        execl("/proc/self/exe", "child", f->dir, f->url, id, (char *)NULL);
        _exit(3);
    }
    return pid;
}

static void test_race_of_processes(void **state)
{
    enum { N = 4 };
    struct fix *f = *state;
    pid_t pids[N];
    for (int i = 0; i < N; i++)
        pids[i] = spawn_get(f, "slow");
    for (int i = 0; i < N; i++) {
        int status;
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    char tmp[128];
    snprintf(tmp, sizeof tmp, "%s/tmp", f->dir);
    assert_int_equal(entries(tmp), 0);
    assert_true(installed(f, "slow"));
    assert_int_equal(hits(f, "/slow/" CACHE_WEIGHTS), 1);       /* one download for all */
}

/* A process that is stopped while it fetches holds the others up for a while, not for ever; one
 * that dies does not at all. */
static void test_claim_ends_with_its_process(void **state)
{
    struct fix *f = *state;
    int status;
    pid_t pid = spawn_get(f, "first-silent");
    for (int i = 0; i < WAIT_S * 1000 && f->site->total == 0; i++)
        usleep(1000);
    struct answer w;
    answer_init(&w);
    open_store(f, NULL);
    store_get(f->s, "first-silent", on_done, &w);
    usleep(200000);
    assert_int_equal(w.calls, 0);
    assert_int_equal(f->site->total, 1);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    await(&w, 1);
    assert_int_equal(w.status, LM_OK);
}

static void test_kill_and_sweep(void **state)
{
    struct fix *f = *state;
    char tmp[128];
    int status;
    snprintf(tmp, sizeof tmp, "%s/tmp", f->dir);
    pid_t pid = spawn_get(f, "silent");
    for (int i = 0; i < WAIT_S * 1000 && f->site->total == 0; i++)
        usleep(1000);
    usleep(20000);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(entries(tmp), 1);          /* left behind */
    open_store(f, NULL);
    assert_int_equal(entries(tmp), 1);          /* ours only */
    expect_blob(f, "good", &weights);
    store_free(f->s);
    f->s = NULL;
    assert_int_equal(entries(tmp), 0);
}

static void test_sweep_spares_the_living(void **state)
{
    struct fix *f = *state;
    char tmp[128];
    store *other;
    struct store_config cfg = base_config(f);
    snprintf(tmp, sizeof tmp, "%s/tmp", f->dir);
    open_store(f, NULL);
    assert_int_equal(store_new_with(&cfg, &hooks, &other, NULL), LM_OK);
    assert_int_equal(entries(tmp), 2);
    expect_blob(f, "good", &weights);
    store_free(other);
    assert_int_equal(entries(tmp), 1);
}

/* ---- the end ---------------------------------------------------------------------------- */

static void test_free_cancels_transfers(void **state)
{
    struct fix *f = *state;
    struct answer w;
    struct store_config cfg = base_config(f);
    cfg.concurrency = 1;        /* one runs, the others wait for its slot */
    answer_init(&w);
    open_store(f, &cfg);
    store_get(f->s, "silent", on_done, &w);
    store_get(f->s, "silent", on_done, &w);
    store_get(f->s, "good", on_done, &w);
    usleep(20000);
    store_free(f->s);
    f->s = NULL;
    assert_int_equal(w.calls, 3);
    assert_int_equal(w.status, LM_CANCELLED);
}

static void test_free_while_loading(void **state)
{
    struct fix *f = *state;
    struct answer w;
    answer_init(&w);
    open_store(f, NULL);
    host.block = true;
    store_get(f->s, "good", on_done, &w);
    for (int i = 0; i < WAIT_S * 1000 && hits(f, "/good/" CACHE_WEIGHTS) == 0; i++)
        usleep(1000);
    usleep(20000);
    host.block = false;
    store_free(f->s);
    f->s = NULL;
    assert_int_equal(w.calls, 1);
    assert_true(w.status == LM_OK || w.status == LM_CANCELLED);
}

/* ---- letting go ------------------------------------------------------------------------- */

static void until_idle(struct fix *f)
{
    struct store_stats st = { .in_flight = 1 };
    for (int i = 0; i < WAIT_S * 1000 && st.in_flight; i++) {
        usleep(1000);
        store_stats(f->s, &st);
    }
    assert_int_equal(st.in_flight, 0);
}

static void test_let_go_beside_others(void **state)
{
    struct fix *f = *state;
    struct answer goes, stays;
    answer_init(&goes);
    answer_init(&stays);
    open_store(f, NULL);
    assert_false(store_let_go(f->s, "slow", &goes));
    store_get(f->s, "slow", on_done, &goes);
    store_get(f->s, "slow", on_done, &stays);
    store_get(f->s, "slow", on_done, &goes);
    assert_false(store_let_go(f->s, "good", &goes));
    assert_true(store_let_go(f->s, "slow", &goes));
    assert_true(store_let_go(f->s, "slow", &goes));
    assert_false(store_let_go(f->s, "slow", &goes));
    await(&stays, 1);
    until_idle(f);
    assert_int_equal(stays.status, LM_OK);
    assert_int_equal(stays.a->refs, 1);
    assert_int_equal(goes.calls, 0);
    assert_false(store_let_go(f->s, "slow", &stays));
}

/* Nobody waits: no further attempt, and whoever asks afterwards is served as ever. */
static void test_let_go_by_all(void **state)
{
    struct fix *f = *state;
    struct answer goes;
    struct store_stats st;
    answer_init(&goes);
    open_store(f, NULL);
    store_get(f->s, "silent", on_done, &goes);
    assert_true(store_let_go(f->s, "silent", &goes));
    until_idle(f);
    store_stats(f->s, &st);
    assert_int_equal(goes.calls, 0);
    assert_int_equal(st.failures, 0);
    assert_true(f->site->total <= 1);
    store_get(f->s, "first-silent", on_done, &goes);
    assert_true(store_let_go(f->s, "first-silent", &goes));
    expect_blob(f, "good", &weights);
    expect_blob(f, "first-silent", &weights);
    assert_int_equal(goes.calls, 0);
}

/* Nobody waits for what a silent server is to send, and somebody for something else. */
static void test_let_go_gives_its_slot(void **state)
{
    struct fix *f = *state;
    struct answer goes, stays;
    struct store_config cfg = base_config(f);
    cfg.concurrency = 1;
    cfg.stall_timeout_ms = WAIT_S * 1000;
    answer_init(&goes);
    answer_init(&stays);
    open_store(f, &cfg);
    store_get(f->s, "silent", on_done, &goes);
    for (int i = 0; i < WAIT_S * 1000 && f->site->total == 0; i++)
        usleep(1000);
    store_get(f->s, "good", on_done, &stays);
    usleep(50000);
    assert_int_equal(stays.calls, 0);   /* somebody waits for the other yet */
    int64_t start = lm_now_us();
    assert_true(store_let_go(f->s, "silent", &goes));
    await(&stays, 1);
    assert_int_equal(stays.status, LM_OK);
    assert_true(lm_now_us() - start < WAIT_S * 1000000 / 2);
    until_idle(f);
    assert_int_equal(goes.calls, 0);
}

/* It came too late to be stopped: it is there for the next, and nobody holds it. */
static void test_let_go_while_loading(void **state)
{
    struct fix *f = *state;
    struct answer goes;
    answer_init(&goes);
    open_store(f, NULL);
    host.block = true;
    store_get(f->s, "good", on_done, &goes);
    for (int i = 0; i < WAIT_S * 1000 && hits(f, "/good/" CACHE_WEIGHTS) == 0; i++)
        usleep(1000);
    assert_true(store_let_go(f->s, "good", &goes));
    host.block = false;
    until_idle(f);
    assert_int_equal(host.n, 1);
    assert_int_equal(host.held[0]->refs, 0);
    assert_int_equal(goes.calls, 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv)
{
    static const char *const proxies[] = { "http_proxy", "https_proxy", "all_proxy",
                                           "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY" };
    for (size_t i = 0; i < LM_COUNT(proxies); i++)
        unsetenv(proxies[i]);
    signal(SIGPIPE, SIG_IGN);
    lm_log_set_sink(quiet, NULL);
    weights = make_weights(1);
    weights2 = make_weights(2);
    if (argc == 4)
        return child_main(argv[1], argv[2], argv[3]);
    const struct CMUnitTest tests[] = {
        TEST(test_fetch_install_load), TEST(test_memory_hit), TEST(test_disk_hit_without_server),
        TEST(test_emptied_cache_is_made_again),
        TEST(test_single_flight), TEST(test_nested_ids_are_apart),
        TEST(test_other_requests_go_on), TEST(test_local_folder), TEST(test_query_in_template),
        TEST(test_not_found_is_remembered),
        TEST(test_not_found_is_remembered_no_longer_than_asked), TEST(test_final_codes),
        TEST(test_bad_ids_ask_nobody),
        TEST(test_bad_settings), TEST(test_unusable_cache_folder), TEST(test_engine_refuses),
        TEST(test_engine_has_no_room), TEST(test_retry_after), TEST(test_retry_408_429),
        TEST(test_waiting_costs_little),
        TEST(test_gives_up), TEST(test_connection_refused), TEST(test_resume),
        TEST(test_no_resume_without_strong_validator), TEST(test_changed_between_attempts),
        TEST(test_lying_content_range), TEST(test_416_starts_over), TEST(test_unasked_part),
        TEST(test_short_body), TEST(test_too_large), TEST(test_silence_and_trickle),
        TEST(test_not_an_adapter), TEST(test_nonsense_protocol), TEST(test_redirects),
        TEST(test_credentials_stay_home), TEST(test_messages_hide_credentials),
        TEST(test_a_file_url_hides_them_too),
        TEST(test_damage_heals), TEST(test_bad_copy_is_fetched_once_more_only),
        TEST(test_race_of_processes), TEST(test_claim_ends_with_its_process),
        TEST(test_kill_and_sweep),
        TEST(test_sweep_spares_the_living), TEST(test_free_cancels_transfers),
        TEST(test_free_while_loading), TEST(test_let_go_beside_others), TEST(test_let_go_by_all),
        TEST(test_let_go_gives_its_slot), TEST(test_let_go_while_loading),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    free(weights.bytes);
    free(weights2.bytes);
    return failed;
}
