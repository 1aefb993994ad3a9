/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_claim.c - what the object store's answer to an upload means for the reply: it is
 * there, it is waited for, or its prompt is a dead letter that says what the store said.
 *
 * The thread that uploads and libcurl are real, the store is hostile_http.h's; what becomes of a
 * reply is wrapped by the linker.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>
#include <openssl/evp.h>

#include "consumer_world.h"
#include "hostile_http.h"
#include "worker/outcome.h"
#include "worker/worker.h"

enum { PATIENCE_MS = 10000 };

enum fate { NONE, CLAIMED, DEAD };

static atomic_int fate;
static struct lm_err cause;

void __wrap_outcome_dead_letter(struct worker *w, struct job *j, const struct lm_err *why,
                               const char *stage);
void __wrap_outcome_dead_letter(struct worker *w, struct job *j, const struct lm_err *why,
                               const char *stage)
{
    (void)w, (void)j;
    assert_string_equal(stage, "CLAIM");
    cause = *why;
    atomic_store(&fate, DEAD);
}

lm_status __wrap_outcome_claimed(struct worker *w, struct job *j,
                                const struct completion_claim *claim);
lm_status __wrap_outcome_claimed(struct worker *w, struct job *j,
                                const struct completion_claim *claim)
{
    (void)w, (void)j, (void)claim;
    atomic_store(&fate, CLAIMED);
    return LM_OK;
}

/* The answer is in the path: /answer/STATUS.CODE/... */
static void say(struct request *r)
{
    int status = 500;
    char code[64] = "", sink[256];
    sscanf(r->path, "/answer/%d.%63[^/]", &status, code);
    sendf(r, "HTTP/1.1 %d x\r\nContent-Type: application/xml\r\nConnection: close\r\n"
          "Location: http://127.0.0.1:1/\r\n\r\n", status);
    if (strcmp(code, "-"))
        sendf(r, "<?xml version=\"1.0\"?>\n<Error><Code>%s</Code><Message>x</Message></Error>",
              code);
    shutdown(r->fd, SHUT_WR);
    while (recv(r->fd, sink, sizeof sink, 0) > 0)       /* no reset may overtake the answer */
        ;
}

static const struct { const char *answer; enum fate fate; lm_status code; const char *says; }
rows[] = {
    { "200.-", CLAIMED, 0, "" }, { "201.-", CLAIMED, 0, "" }, { "204.-", CLAIMED, 0, "" },
    { "413.EntityTooLarge", DEAD, LM_TOO_LARGE, "the reply has 5 bytes, more than the object" },
    { "301.PermanentRedirect", DEAD, LM_INVALID, "HTTP 301 PermanentRedirect, see replies.claim" },
    { "307.-", DEAD, LM_INVALID, "HTTP 307, see" }, { "304.-", DEAD, LM_INVALID, "HTTP 304" },
    { "400.AuthorizationHeaderMalformed", DEAD, LM_INVALID, "400 AuthorizationHeaderMalformed," },
    { "400.-", DEAD, LM_INVALID, "HTTP 400, see" }, { "400.<x>", DEAD, LM_INVALID, "400, see" },
    { "404.NoSuchBucket", DEAD, LM_INVALID, "HTTP 404 NoSuchBucket" },
    { "405.-", DEAD, LM_INVALID, "405" }, { "411.MissingContentLength", DEAD, LM_INVALID, "411" },
    { "499.-", DEAD, LM_INVALID, "HTTP 499" },
    { "400.RequestTimeout", NONE, 0, "" }, { "400.ExpiredToken", NONE, 0, "" },
    { "401.-", NONE, 0, "" }, { "403.AccessDenied", NONE, 0, "" }, { "404.-", NONE, 0, "" },
    { "407.-", NONE, 0, "" }, { "408.-", NONE, 0, "" },
    { "409.OperationAborted", NONE, 0, "" }, { "425.-", NONE, 0, "" }, { "429.-", NONE, 0, "" },
    { "500.InternalError", NONE, 0, "" }, { "503.SlowDown", NONE, 0, "" }, { "599.-", NONE, 0, "" },
};

/* Until it has a fate, or is to be tried again. Returns whether it is. */
static bool upload(struct world *x, int port, const char *answer, struct job *j)
{
    char url[160];
    claims *c;
    snprintf(url, sizeof url, "http://127.0.0.1:%d/answer/%s/{object}", port, answer);
    x->cfg.claim_url = url;
    j->out.value = (char *)"reply";
    j->out.len = 5;
    uint64_t retries = atomic_load(&x->w.metrics.retries);
    atomic_store(&fate, NONE);
    atomic_store(&x->w.ending, false);
    assert_int_equal(claims_new(&x->w, &c, NULL), LM_OK);
    claims_put(c, j);
    for (int k = 0; k < PATIENCE_MS && !atomic_load(&fate) &&
                    atomic_load(&x->w.metrics.retries) == retries; k++)
        usleep(1000);
    atomic_store(&x->w.ending, true);
    claims_free(c);
    job_queue_take(&x->w.done, 0);      /* what was to be tried again, dropped at the end */
    return atomic_load(&x->w.metrics.retries) - retries == 1;
}

static void upload_once(struct world *x, int port, size_t i)
{
    struct job *j = world_deliver(x, (int64_t)i, NULL);
    bool again = upload(x, port, rows[i].answer, j);
    if (atomic_load(&fate) != (int)rows[i].fate)
        fail_msg("%s: %d, %s", rows[i].answer, atomic_load(&fate), cause.msg);
    assert_int_equal(again, rows[i].fate == NONE);
    if (rows[i].fate == DEAD && (cause.code != rows[i].code || !strstr(cause.msg, rows[i].says)))
        fail_msg("%s: %s", rows[i].answer, cause.msg);
    job_unref(j);
}

static const struct rule rules[] = { { "answer", say }, { NULL, NULL } };

static struct world *open_world(void)
{
    struct world *x = world_open();
    x->cfg.claim_auth_header = x->cfg.claim_s3_region = x->cfg.adapters_ca_file = (char *)"";
    x->cfg.retry_backoff_ms = x->cfg.retry_backoff_max_ms = 60000;
    return x;
}

static void test_answers(void **state)
{
    (void)state;
    struct site *site = site_open(rules);
    struct world *x = open_world();
    for (size_t i = 0; i < LM_COUNT(rows); i++)
        upload_once(x, site->port, i);
    world_close(x);
    site_close(site);
}

int __real_EVP_Digest(const void *data, size_t n, unsigned char *md, unsigned int *size,
                      const EVP_MD *type, ENGINE *impl);
int __wrap_EVP_Digest(const void *data, size_t n, unsigned char *md, unsigned int *size,
                      const EVP_MD *type, ENGINE *impl);
static atomic_bool no_memory;

int __wrap_EVP_Digest(const void *data, size_t n, unsigned char *md, unsigned int *size,
                      const EVP_MD *type, ENGINE *impl)
{
    return atomic_load(&no_memory) ? 0 : __real_EVP_Digest(data, n, md, size, type, impl);
}

/* Else all replies would be the same object, and each would overwrite the one before. */
static void test_no_object_without_its_name(void **state)
{
    (void)state;
    struct site *site = site_open(rules);
    struct world *x = open_world();
    struct job *j = world_deliver(x, 0, NULL);
    atomic_store(&no_memory, true);
    assert_true(upload(x, site->port, "200.-", j));
    assert_int_equal(site->total, 0);
    assert_int_equal(atomic_load(&fate), NONE);
    atomic_store(&no_memory, false);
    assert_false(upload(x, site->port, "200.-", j));
    assert_int_equal(atomic_load(&fate), CLAIMED);
    job_unref(j);
    world_close(x);
    site_close(site);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers), cmocka_unit_test(test_no_object_without_its_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
