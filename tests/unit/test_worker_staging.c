/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_staging.c - what became of a transaction whose commit was not answered, told by what
 * the group holds; and what a transaction may take when the offset map has no room. The rest of
 * staging needs brokers: tests/integration/test_commits.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/consumer_int.h"

static void put(rd_kafka_topic_partition_list_t *l, int32_t partition, int64_t offset,
                const char *metadata)
{
    rd_kafka_topic_partition_t *p = rd_kafka_topic_partition_list_add(l, "t", partition);
    p->offset = offset;
    p->metadata_size = metadata ? strlen(metadata) : 0;
    p->metadata = metadata ? lm_strdup(metadata) : NULL;
}

/* The stage sends offset 11 with "map" for partition 0, and 7 with "mark" for partition 1; it
 * finishes a prompt of partition 0 if `finishes`. The group holds these. */
static bool held(bool finishes, int64_t offset, const char *map, const char *mark)
{
    struct lease lease = { .partition = 0, .topic = "t" };
    struct job job = { .lease = &lease }, part = { .lease = &lease, .parent = &job };
    struct job *jobs[] = { NULL, &part, finishes ? &job : NULL };
    enum stage_verdict verdicts[] = { STAGE_GONE, STAGE_IN, finishes ? STAGE_IN : STAGE_WAIT };
    struct stage s = { .jobs = jobs, .verdicts = verdicts, .n = LM_COUNT(jobs),
                       .offsets = rd_kafka_topic_partition_list_new(2) };
    rd_kafka_topic_partition_list_t *group = rd_kafka_topic_partition_list_new(2);
    put(s.offsets, 0, 11, "map");
    put(s.offsets, 1, 7, "mark");
    put(group, 1, 7, mark);
    put(group, 0, offset, map);
    bool is = stage_held(&s, group);
    rd_kafka_topic_partition_list_destroy(group);
    rd_kafka_topic_partition_list_destroy(s.offsets);
    return is;
}

static void test_committed(void **state)
{
    (void)state;
    assert_true(held(true, 11, "map", "mark"));
    assert_true(held(true, 11, "map", "another's"));    /* it was taken away since */
}

static void test_not_committed(void **state)
{
    (void)state;
    assert_false(held(true, 10, "map", NULL));
    assert_false(held(true, 11, "mad", NULL));
    assert_false(held(true, 11, NULL, NULL));
    assert_false(held(true, RD_KAFKA_OFFSET_INVALID, NULL, NULL));
}

/* The same mark was committed before, by an earlier transaction: it tells nothing of this one, the
 * replies of which would be lost. */
static void test_old_mark(void **state)
{
    (void)state;
    assert_false(held(true, 10, NULL, "mark"));
}

static void test_marks_alone(void **state)
{
    (void)state;
    assert_true(held(false, 10, NULL, "mark"));
    assert_false(held(false, 10, NULL, NULL));
}

/* ---- a map without room ------------------------------------------------------------------- */

enum { PROMPTS = 8, APART = 1000 };     /* gaps are normal, and make maps long */

/* A consumer thread's world: one partition with PROMPTS prompts, read and unfinished. */
struct world {
    struct worker w;
    struct consumer c;
    struct assigned part;
    struct job *jobs[PROMPTS];
};

static void drop_job(void *ctx, int64_t offset, void *user)
{
    (void)ctx;
    (void)offset;
    job_unref(user);
}

static int open_world(void **state)
{
    char why[128];
    static struct config cfg;
    struct world *x = lm_calloc(1, sizeof *x);
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "group.id", "g", why, sizeof why);
    x->w.cfg = &cfg;
    x->c = (struct consumer){ .w = &x->w, .parts = &x->part, .n_parts = 1, .map_limit = 4096,
                              .rk = rd_kafka_new(RD_KAFKA_CONSUMER, conf, why, sizeof why),
                              .ledger = ledger_new(drop_job, NULL, 4096) };
    x->c.queue = rd_kafka_queue_get_consumer(x->c.rk);
    staging_init(&x->c.staging);
    ledger_assign(x->c.ledger, "t", 0, 0, &x->part.ref);
    x->part.lease = lease_new("t", 0, x->part.ref);
    for (int i = 0; i < PROMPTS; i++) {
        job_new(x->part.lease, &(struct record){ .offset = i * APART }, &x->jobs[i]);
        ledger_deliver(x->c.ledger, x->part.ref, i * APART, job_ref(x->jobs[i]));
    }
    *state = x;
    return 0;
}

static int close_world(void **state)
{
    struct world *x = *state;
    ledger_free(x->c.ledger);
    for (int i = 0; i < PROMPTS; i++)
        job_unref(x->jobs[i]);
    lease_unref(x->part.lease);
    rd_kafka_queue_destroy(x->c.queue);
    rd_kafka_destroy(x->c.rk);
    staging_release(&x->c.staging);
    free(x);
    return 0;
}

static void serve(struct world *x, struct stage *s, enum staging_what what)
{
    x->c.staging.asked = s;
    x->c.staging.what = what;
    staging_serve(&x->c);
}

/* A transaction for these prompts, "0 2" say; returns those that it may hold. */
static const char *transact(struct world *x, const char *offsets, enum staging_what end,
                            bool too_long)
{
    static char in[32];
    struct job *jobs[PROMPTS];
    enum stage_verdict verdicts[PROMPTS];
    struct stage s = { .jobs = jobs, .verdicts = verdicts };
    for (const char *at = offsets; *at; at++)
        if (*at != ' ')
            jobs[s.n++] = x->jobs[*at - '0'];
    serve(x, &s, STAGING_STAGE);
    s.too_long = too_long;
    serve(x, &s, end);
    in[0] = '\0';
    for (size_t i = 0; i < s.n; i++)
        if (verdicts[i] == STAGE_IN) {
            snprintf(in + strlen(in), sizeof in - strlen(in), "%d ",
                     (int)jobs[i]->record.offset / APART);
            void *held = NULL;
            if (end == STAGING_COMMITTED &&
                !ledger_complete(x->c.ledger, x->part.ref, jobs[i]->record.offset, &held))
                job_unref(held);
        }
    stage_release(&s);
    return in;
}

static int64_t watermark(struct world *x)
{
    struct ledger_info info;
    assert_true(ledger_get(x->c.ledger, x->part.ref, &info));
    return info.watermark / APART;
}

/* Refused until what lies beyond the watermark finds no room, and waits for it. */
static void test_no_room(void **state)
{
    struct world *x = *state;
    for (int tries = 0; *transact(x, "1 3", STAGING_ABORTED, true); tries++)
        assert_true(tries < 12);
    assert_string_equal(transact(x, "1 3", STAGING_COMMITTED, false), "");
    assert_string_equal(transact(x, "0 1 3", STAGING_COMMITTED, false), "0 1 ");
    assert_int_equal(watermark(x), 2);
}

/* commit.map_max_bytes=0. */
static void test_no_map(void **state)
{
    struct world *x = *state;
    x->c.map_limit = 0;
    ledger_set_map_limit(x->c.ledger, 0);
    assert_string_equal(transact(x, "1 3", STAGING_COMMITTED, false), "");
    assert_string_equal(transact(x, "0 1 3", STAGING_COMMITTED, false), "0 1 ");
}

/* What was finished beyond the watermark while there was room must not hold the watermark up. */
static void test_room_that_is_lost(void **state)
{
    struct world *x = *state;
    assert_string_equal(transact(x, "1 3 5", STAGING_COMMITTED, false), "1 3 5 ");
    ledger_set_map_limit(x->c.ledger, 0);
    assert_string_equal(transact(x, "0 7", STAGING_COMMITTED, false), "0 ");
    assert_int_equal(watermark(x), 2);
    assert_string_equal(transact(x, "2", STAGING_COMMITTED, false), "2 ");
    assert_int_equal(watermark(x), 4);
}

/* What the broker has accepted is said again. */
static void test_room_that_is_known(void **state)
{
    struct world *x = *state;
    assert_string_equal(transact(x, "1 3", STAGING_COMMITTED, false), "1 3 ");
    size_t taken = x->c.taken;
    assert_true(taken > 0);
    for (int i = 0; i < 12; i++)
        transact(x, "5 7", STAGING_ABORTED, true);
    assert_int_equal(x->c.map_limit, taken);
    assert_string_equal(transact(x, "5 7", STAGING_COMMITTED, false), "");
    assert_string_equal(transact(x, "0", STAGING_COMMITTED, false), "0 ");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_committed), cmocka_unit_test(test_not_committed),
        cmocka_unit_test(test_old_mark), cmocka_unit_test(test_marks_alone),
        cmocka_unit_test_setup_teardown(test_no_room, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_no_map, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_room_that_is_lost, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_room_that_is_known, open_world, close_world),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
