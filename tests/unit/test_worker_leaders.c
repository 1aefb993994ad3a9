/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_leaders.c - which partitions of a producer are stuck, by statistics of the form that
 * librdkafka's STATISTICS.md gives, and whether the brokers name another leader for them. That a
 * worker gets over it is test_brokers.sh's to prove.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/base.h"
#include "worker/leaders.h"

static long long clock_us;      /* when statistics are made */
static int asked_ms;            /* brokers, in all */
static int answer_leader;       /* who leads what was stuck; -1: they don't answer */

/* These win over the shared library's. */
rd_kafka_resp_err_t rd_kafka_metadata(rd_kafka_t *rk, int all, rd_kafka_topic_t *only,
                                      const struct rd_kafka_metadata **out, int timeout_ms)
{
    static char third[] = "third", fourth[] = "fourth";
    static rd_kafka_metadata_partition_t part;
    static rd_kafka_metadata_topic_t t[] = {
        { .topic = fourth, .partition_cnt = 1, .partitions = &part },
        { .topic = third, .partition_cnt = 1, .partitions = &part } };
    static rd_kafka_metadata_t md = { .topics = t, .topic_cnt = LM_COUNT(t) };
    (void)rk;
    assert_false(all || only);          /* all that the client knows */
    asked_ms += timeout_ms;
    part.leader = answer_leader;
    *out = &md;
    return answer_leader < 0 ? RD_KAFKA_RESP_ERR__TIMED_OUT : RD_KAFKA_RESP_ERR_NO_ERROR;
}

void rd_kafka_metadata_destroy(const struct rd_kafka_metadata *md)
{
    (void)md;
}

/* One topic of two partitions: how many were queued, and acknowledged, on each. */
static json_t *stats(int waiting, int msgs0, int acked0, int msgs1, int acked1)
{
    char text[600];
    snprintf(text, sizeof text, "{\"ts\": %lld, \"msg_cnt\": %d, "
             "\"topics\": {\"side\": {\"partitions\": {"
             "\"0\": {\"partition\": 0, \"leader\": 1, \"msgs\": %d, \"acked_msgid\": %d},"
             "\"1\": {\"partition\": 1, \"leader\": 2, \"msgs\": %d, \"acked_msgid\": %d},"
             "\"-1\": {\"partition\": -1, \"leader\": -1, \"msgs\": 5, \"acked_msgid\": 0}}}}}",
             clock_us, waiting, msgs0, acked0, msgs1, acked1);
    clock_us += 10000000;
    return json_loads(text, 0, NULL);
}

/* What the next statistics are taken for. */
static size_t look(struct leaders *l, json_t *root, struct stuck *out, size_t most)
{
    size_t n = leaders_stuck(l, root, out, most);
    json_decref(root);
    return n;
}

static void stuck_is_what_has_not_moved_since(void **state)
{
    (void)state;
    struct leaders l = { 0 };
    struct stuck s[2];
    assert_int_equal(look(&l, stats(3, 10, 7, 5, 5), s, 2), 0);         /* the first time */
    assert_int_equal(look(&l, stats(4, 11, 8, 6, 5), s, 2), 0);         /* 0 moves, 1 is new */
    assert_int_equal(look(&l, stats(9, 15, 10, 9, 5), s, 2), 1);
    assert_string_equal(s[0].topic, "side");
    assert_int_equal(s[0].partition, 1);
    assert_int_equal(s[0].leader, 2);
    assert_int_equal(look(&l, stats(9, 15, 10, 9, 5), s, 2), 2);
    assert_int_equal(look(&l, stats(9, 15, 10, 9, 5), s, 1), 1);        /* no room for more */
    assert_int_equal(look(&l, stats(4, 15, 11, 9, 9), s, 2), 0);
    leaders_release(&l);
}

/* However often statistics come, none acknowledged for less than ten seconds is no wonder. */
static void stuck_takes_its_time(void **state)
{
    (void)state;
    struct leaders l = { 0 };
    struct stuck s[2];
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 11; i++) {
            assert_int_equal(look(&l, stats(3, 10, 7 + round, 5, 5), s, 2), i == 10);
            clock_us -= 9000000;
        }
    leaders_release(&l);
}

/* A record that was given up leaves a gap for ever; nothing waits for it. */
static void nothing_waits(void **state)
{
    (void)state;
    struct leaders l = { 0 };
    struct stuck s[2];
    assert_int_equal(look(&l, stats(0, 10, 7, 5, 5), s, 2), 0);
    assert_int_equal(look(&l, stats(0, 10, 7, 5, 5), s, 2), 0);
    assert_int_equal(look(&l, stats(1, 11, 7, 5, 5), s, 2), 0);
    assert_int_equal(look(&l, stats(1, 11, 7, 5, 5), s, 2), 1);
    leaders_release(&l);
}

static void other_texts(void **state)
{
    (void)state;
    static const char *const texts[] = { "[]", "{}", "{\"msg_cnt\": \"x\"}",
        "{\"msg_cnt\": 1, \"topics\": 3}", "{\"msg_cnt\": 1, \"topics\": {\"a\": []}}",
        "{\"msg_cnt\": 1, \"topics\": {\"a\": {\"partitions\": {\"0\": 7}}}}" };
    struct leaders l = { 0 };
    struct stuck s[2];
    for (size_t i = 0; i < 2 * (sizeof texts / sizeof *texts); i++)
        assert_int_equal(look(&l, json_loads(texts[i / 2], 0, NULL), s, 2), 0);
    assert_int_equal(look(&l, NULL, s, 2), 0);
    leaders_release(&l);
}

static bool differ(const char *topic, rd_kafka_resp_err_t err, int id, int leader)
{
    const struct stuck s = { .topic = "side", .partition = 3, .leader = 1 };
    char name[8];
    snprintf(name, sizeof name, "%s", topic);
    rd_kafka_metadata_partition_t p[2] = { { .id = 7, .leader = 9 }, { .id = id,
                                           .leader = leader } };
    rd_kafka_metadata_topic_t t = { .topic = name, .partition_cnt = 2, .partitions = p,
                                    .err = err };
    const rd_kafka_metadata_t md = { .topic_cnt = 1, .topics = &t };
    return leaders_differ(&s, &md);
}

static void another_leads(void **state)
{
    (void)state;
    assert_true(differ("side", 0, 3, 2));
    assert_false(differ("side", 0, 3, 1));
    assert_false(differ("side", 0, 3, -1));         /* nobody does */
    assert_false(differ("side", 0, 4, 2));
    assert_false(differ("else", 0, 3, 2));
    assert_false(differ("side", RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART, 3, 2));
}

/* However many topics are stuck: nothing else is done while their leaders are asked for. */
static void one_question_for_all(void **state)
{
    const struct stuck s[] = { { "side", 0, 1 }, { "side", 1, 1 }, { "other", 0, 1 },
                               { "third", 0, 1 }, { "fourth", 0, 2 } };
    (void)state;
    answer_leader = 2;
    assert_int_equal(leaders_moved(NULL, s, LM_COUNT(s)), 3);
    assert_int_equal(asked_ms, 1000);
    assert_int_equal(leaders_moved(NULL, s + 4, 1), 1);
    answer_leader = -1;
    assert_int_equal(leaders_moved(NULL, s, LM_COUNT(s)), LM_COUNT(s));
    asked_ms = 0;
    assert_int_equal(leaders_moved(NULL, s, 0), 0);
    assert_int_equal(asked_ms, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stuck_is_what_has_not_moved_since), cmocka_unit_test(nothing_waits),
        cmocka_unit_test(stuck_takes_its_time), cmocka_unit_test(one_question_for_all),
        cmocka_unit_test(other_texts), cmocka_unit_test(another_leads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
