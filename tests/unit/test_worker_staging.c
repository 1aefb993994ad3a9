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
#include <string.h>

#include <cmocka.h>

#include "consumer_world.h"

static void put(rd_kafka_topic_partition_list_t *l, int32_t partition, int64_t offset,
                const char *metadata)
{
    rd_kafka_topic_partition_t *p = rd_kafka_topic_partition_list_add(l, "t", partition);
    p->offset = offset;
    p->metadata_size = metadata ? strlen(metadata) : 0;
    p->metadata = metadata ? lm_strdup(metadata) : NULL;
}

/* The stage sends offset 11 with "map" for partition 0, and 7 with "mark" for partition 1; it
 * finishes a prompt of partition 0 if `finishes`, and has a part of one if `streams`. The group
 * holds these. */
static bool holds(bool finishes, bool streams, int64_t offset, const char *map, const char *mark)
{
    struct lease lease = { .partition = 0, .topic = "t" };
    struct job job = { .lease = &lease }, part = { .lease = &lease, .parent = &job };
    struct job *jobs[] = { NULL, &part, finishes ? &job : NULL };
    enum stage_verdict verdicts[] = { STAGE_GONE, streams ? STAGE_IN : STAGE_GONE,
                                      finishes ? STAGE_IN : STAGE_WAIT };
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

static bool held(bool finishes, int64_t offset, const char *map, const char *mark)
{
    return holds(finishes, finishes, offset, map, mark);
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

/* Nor does it tell of parts, the next of which would follow a gap: they go again. */
static void test_marks_beside_parts(void **state)
{
    (void)state;
    assert_false(holds(false, true, 10, NULL, "mark"));
    assert_false(holds(false, true, 10, NULL, NULL));
}

/* ---- a map without room ------------------------------------------------------------------- */

enum { PROMPTS = 8, APART = 1000 };     /* gaps are normal, and make maps long */

static struct job *jobs[PROMPTS];       /* read and unfinished */

static int open_world(void **state)
{
    struct world *x = world_open();
    for (int i = 0; i < PROMPTS; i++)
        jobs[i] = world_deliver(x, i * APART, NULL);
    *state = x;
    return 0;
}

static int close_world(void **state)
{
    for (int i = 0; i < PROMPTS; i++)
        job_unref(jobs[i]);
    world_close(*state);
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
    struct job *held[PROMPTS];
    enum stage_verdict verdicts[PROMPTS];
    struct stage s = { .jobs = held, .verdicts = verdicts };
    for (const char *at = offsets; *at; at++)
        if (*at != ' ')
            held[s.n++] = jobs[*at - '0'];
    serve(x, &s, STAGING_STAGE);
    s.too_long = too_long;
    serve(x, &s, end);
    in[0] = '\0';
    for (size_t i = 0; i < s.n; i++)
        if (verdicts[i] == STAGE_IN) {
            snprintf(in + strlen(in), sizeof in - strlen(in), "%d ",
                     (int)held[i]->record.offset / APART);
            void *user = NULL;
            if (end == STAGING_COMMITTED &&
                !ledger_complete(x->c.ledger, x->part.ref, held[i]->record.offset, &user))
                job_unref(user);
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

char *__real_lm_strdup(const char *s);
char *__wrap_lm_strdup(const char *s);
static bool no_memory;                  /* for the next text */

char *__wrap_lm_strdup(const char *s)
{
    bool fails = no_memory;
    no_memory = false;
    return fails ? NULL : __real_lm_strdup(s);
}

/* What the map does not know would be answered again, after a crash. */
static void test_no_memory_for_the_map(void **state)
{
    struct world *x = *state;
    struct job *held[] = { jobs[1] };
    enum stage_verdict verdicts[1];
    struct stage s = { .jobs = held, .n = 1, .verdicts = verdicts };
    no_memory = true;
    serve(x, &s, STAGING_STAGE);
    assert_false(no_memory);
    assert_true(s.lost);
    assert_int_equal(s.offsets->cnt, 0);
    serve(x, &s, STAGING_ABORTED);
    stage_release(&s);
    assert_string_equal(transact(x, "1", STAGING_COMMITTED, false), "1 ");
    assert_true(x->c.taken > 0);
}

/* A record that was refused on the spot is taken out again: no offset passes it, and the mark that
 * was asked for with the first offsets is asked for with the second ones, or its partition would
 * wait for an answer for ever. */
static void test_refused_on_the_spot(void **state)
{
    struct world *x = *state;
    struct job *held[] = { jobs[0], jobs[1] };
    enum stage_verdict verdicts[2];
    struct stage s = { .jobs = held, .n = 2, .verdicts = verdicts };
    x->cfg.poison_max_attempts = 3;
    isolation_init(&x->c, x->c.map_limit);
    quarantine_init(&x->part.q, 3, 1);
    x->part.held.head = jobs[7];                    /* until the mark is there */
    serve(x, &s, STAGING_STAGE);
    assert_int_equal(s.n_commits, 1);
    assert_int_equal(s.offsets->elems[0].offset, 2 * APART);
    assert_true(x->part.q.asking);
    verdicts[0] = verdicts[1] = STAGE_REFUSED;
    s.from = s.n;
    serve(x, &s, STAGING_STAGE);
    assert_int_equal(s.n_commits, 1);
    assert_int_equal(s.offsets->elems[0].offset, 0);
    assert_true(x->part.q.asking);
    assert_false(s.lost);
    held[0] = held[1] = x->part.held.head = NULL;
    serve(x, &s, STAGING_COMMITTED);
    assert_false(x->part.q.asking);
    assert_int_equal(watermark(x), 0);
    stage_release(&s);
    assert_string_equal(transact(x, "0 1", STAGING_COMMITTED, false), "0 1 ");
}

/* The final record counts a part that was handed over before its partition began to leave, and goes
 * itself until that is another's. */
static void test_part_of_a_partition_that_leaves(void **state)
{
    struct world *x = *state;
    struct job *part = job_child(jobs[0]);
    struct job *held[] = { part, jobs[0] };
    enum stage_verdict verdicts[2];
    struct stage s = { .jobs = held, .n = 2, .verdicts = verdicts };
    atomic_store(&x->part.lease->revoked, true);
    serve(x, &s, STAGING_STAGE);
    assert_int_equal(verdicts[1], STAGE_IN);
    assert_int_equal(verdicts[0], STAGE_IN);
    serve(x, &s, STAGING_ABORTED);
    ledger_revoke(x->c.ledger, x->part.ref);
    serve(x, &s, STAGING_STAGE);
    assert_int_equal(verdicts[1], STAGE_GONE);
    assert_int_equal(verdicts[0], STAGE_GONE);
    serve(x, &s, STAGING_ABORTED);
    stage_release(&s);
    job_unref(part);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_committed), cmocka_unit_test(test_not_committed),
        cmocka_unit_test(test_old_mark), cmocka_unit_test(test_marks_alone),
        cmocka_unit_test(test_marks_beside_parts),
        cmocka_unit_test_setup_teardown(test_no_room, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_refused_on_the_spot, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_no_memory_for_the_map, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_no_map, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_part_of_a_partition_that_leaves, open_world,
                                        close_world),
        cmocka_unit_test_setup_teardown(test_room_that_is_lost, open_world, close_world),
        cmocka_unit_test_setup_teardown(test_room_that_is_known, open_world, close_world),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
