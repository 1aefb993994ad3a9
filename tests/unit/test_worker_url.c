/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_url.c - what messages show of a URL, and that those of an upload show no more; URLs
 * with a hole.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "worker/log.h"
#include "worker/url.h"
#include "worker/url_template.h"
#include "worker/worker.h"

enum { MOST_US = 20 * 1000000 };

static void test_what_is_shown(void **state)
{
    (void)state;
    static const struct { const char *url, *shown; bool userinfo; } rows[] = {
        { "http://host/x", "http://host/x", false },
        { "http://me:pass@host:80/x?sig=1#y", "http://host:80/x", true },
        { "http://pass@host", "http://host", true },
        { "http://me:p@ss@host/x", "http://host/x", true },
        { "https:///me:pass@host/x", "https:///host/x", true },
        { "http:/me:pass@host/x", "http:/host/x", true },
        { "me:pass@host:4318/x", "host:4318/x", true },
        { "host:4318/team@x/y", "host:4318/team@x/y", false },
        { "http://host/team@x?a@b", "http://host/team@x", false },
        { "http://[::1]:80/x", "http://[::1]:80/x", false },
        { "file:///folder/{adapter}", "file:///folder/{adapter}", false },
        { "token:@host/x", "host/x", true },
        { "//me:pass@host/x", "//host/x", true },       /* these are none, and are refused */
        { "http//me:pass@host/x", "http//host/x", true },
        { "http://me:pa/ss@host/x", "http://...", true },
        { "http://me:pa?ss@host/x", "http://...", true },
        { "http://me:12#ss@host", "http://me:12", false },      /* it is port 12 of host me */
        { "http://host:port/x", "http://host:port/x", false },
        { "http://host:80/x:y@z", "http://host:80/x:y@z", false },
        { "http://", "http://", false },
        { "@", "", true },
        { "", "", false },
    };
    char shown[URL_SHOWN];
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        url_show(rows[i].url, shown, sizeof shown);
        assert_string_equal(shown, rows[i].shown);
        assert_int_equal(url_has_userinfo(rows[i].url), rows[i].userinfo);
    }
}

static void test_lists(void **state)
{
    (void)state;
    static const char list[] = "http://a:b@one?x, https://c@two/,,http://three";
    char shown[URL_SHOWN], all[] = "http://one, https://two/,,http://three";
    url_show_list(list, shown, sizeof shown);
    assert_string_equal(shown, all);
    for (size_t size = sizeof all; size > 0; size--) {          /* cut, where it has to be */
        url_show_list(list, shown, size);
        assert_true(strlen(shown) < size && !strncmp(shown, all, strlen(shown)));
    }
}

/* ---- uploads ---------------------------------------------------------------------------- */

static char said[1024];
static atomic_bool has_said;

static void hear(void *ctx, enum lm_level level, const char *area, const char *line)
{
    (void)ctx;
    (void)level;
    (void)area;
    if (!atomic_load(&has_said))
        snprintf(said, sizeof said, "%s", line);
    atomic_store(&has_said, true);
}

/* The log, and, as the same words, a dead letter. */
static void test_what_a_template_needs(void **state)
{
    (void)state;
    static const struct { const char *url; bool files; const char *trouble; } rows[] = {
        { "http://h/{object}", false, NULL },
        { "HTTPS://h/{object}?x=1", false, NULL },
        { "file:///f/{object}", true, NULL },
        { "File:///f/{object}", true, NULL },
        { "file:///f/{object}", false, "p=file:///f/{object}: must begin with http:// or https" },
        { "ftp://h/{object}", true, "must begin with http://, https:// or file://" },
        { "h/{object}", true, "must begin with" },
        { "http://me:pass@h/object?{", false, "p=http://h/object: {object} is missing" },
        { "", true, "must begin with" },
        { "http://{object}/x", false, "p=http://{object}/x: {object} may not stand before" },
        { "https://{object}.h/x/{object}", false, "chooses the host" },
        { "https://h:{object}/x", false, "chooses the host" },
        { "https://{object}@h/x", false, "chooses the host" },
        { "https://{object}", false, "chooses the host" },
        { "https://{object}?x", false, "chooses the host" },
        { "https:///{object}/x", false, "chooses the host" },   /* libcurl forgives the slash */
        { "file://{object}/x", true, "chooses the host" },
        { "file:///{object}", true, NULL },
        { "file://localhost/{object}", true, NULL },
        { "https://h?{object}", false, NULL },
        { "https://h/@{object}", false, NULL },
    };
    struct lm_err err;
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        lm_status st = url_template_check("p", rows[i].url, URL_HOLE_OBJECT, rows[i].files, &err);
        assert_int_equal(st, rows[i].trouble ? LM_INVALID : LM_OK);
        if (rows[i].trouble && !strstr(err.msg, rows[i].trouble))
            fail_msg("%s: %s", rows[i].url, err.msg);
    }
}

static void test_how_a_template_is_filled(void **state)
{
    (void)state;
    static const struct { const char *url, *file, *filled; } rows[] = {
        { "http://h/{adapter}", NULL, "http://h/a/b" },
        { "http://h/{adapter}", "f.json", "http://h/a/b/f.json" },
        { "http://h/{adapter}?sig=1#x", "f.json", "http://h/a/b/f.json?sig=1#x" },
        { "http://h/{adapter}/{adapter}?a={adapter}", "f", "http://h/a/b/a/b/f?a=a/b" },
        { "{adapter}{adapter", NULL, "a/b{adapter" },
        { "http://h/", NULL, "http://h/" },
        { "", "f", "/f" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        char *filled = url_template_fill(rows[i].url, URL_HOLE_ADAPTER, "a/b", rows[i].file);
        assert_string_equal(filled, rows[i].filled);
        free(filled);
    }
}

static void test_an_upload_that_fails(void **state)
{
    (void)state;
    static char none[] = "", url[] = "http://me:hunter2@127.0.0.1:1/{object}?sig=hunter2";
    static char text[] = "a reply";
    const struct timespec tick = { 0, 1000000 };
    struct config cfg = { .claim_url = url, .claim_auth_header = none, .claim_s3_region = none,
                          .adapters_ca_file = none };
    struct worker w = { .cfg = &cfg, .name = "w" };
    struct lease *lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    struct record r = { .offset = 0 };
    struct lm_err err;
    struct job *j;
    claims *c;
    metrics_init(&w.metrics);
    job_queue_init(&w.done);
    lm_log_set_sink(hear, NULL);
    assert_int_equal(job_new(lease, &r, &j), LM_OK);
    j->out.value = text;
    j->out.len = sizeof text;
    assert_int_equal(claims_new(&w, &c, &err), LM_OK);
    claims_put(c, j);
    for (int64_t end = lm_now_us() + MOST_US; !atomic_load(&has_said); nanosleep(&tick, NULL))
        assert_true(lm_now_us() < end);
    atomic_store(&w.ending, true);
    claims_free(c);
    lm_log_set_sink(NULL, NULL);
    assert_non_null(strstr(said, "PUT http://127.0.0.1:1/"));
    assert_null(strstr(said, "hunter2"));
    job_unref(job_queue_take(&w.done, 0));
    job_queue_release(&w.done);
    lease_unref(lease);
    metrics_release(&w.metrics);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_shown), cmocka_unit_test(test_lists),
        cmocka_unit_test(test_what_a_template_needs),
        cmocka_unit_test(test_how_a_template_is_filled),
        cmocka_unit_test(test_an_upload_that_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
