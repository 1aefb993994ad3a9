/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_staging.c - what became of a transaction whose commit was not answered, told by what
 * the group holds. The rest of staging needs brokers: tests/integration/test_commits.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "worker/transaction.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_committed), cmocka_unit_test(test_not_committed),
        cmocka_unit_test(test_old_mark), cmocka_unit_test(test_marks_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
