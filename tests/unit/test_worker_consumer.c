/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_consumer.c - how long the consumer thread waits while others wait for it, and that
 * it commits while a revocation drains. The test plays that thread. What a group makes of it:
 * tests/integration/test_flow.sh, test_partitions.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "consumer_world.h"

static struct job *running;     /* ends when the first commit comes; NULL: none does */
static int commits_meanwhile;
static char metadata[128];      /* of the first of them */

/* Wins over the shared library's: there is no broker. */
rd_kafka_resp_err_t rd_kafka_commit_queue(rd_kafka_t *rk,
                                          const rd_kafka_topic_partition_list_t *offsets,
                                          rd_kafka_queue_t *q, void (*cb)(
                                          rd_kafka_t *, rd_kafka_resp_err_t,
                                          rd_kafka_topic_partition_list_t *, void *),
                                          void *opaque)
{
    (void)rk;
    (void)q;
    (void)cb;
    (void)opaque;
    const rd_kafka_topic_partition_t *p = &offsets->elems[0];
    if (running && atomic_load(&running->stage) == JOB_RUNNING) {
        if (!commits_meanwhile++)
            snprintf(metadata, sizeof metadata, "%lld:%.*s", (long long)p->offset,
                     (int)p->metadata_size, p->metadata ? (const char *)p->metadata : "");
        job_set_stage(running, JOB_READY);
    }
    return RD_KAFKA_RESP_ERR__WAIT_COORD;
}

static struct job *deliver(struct world *x, int64_t offset, const char *key)
{
    struct job *j = world_deliver(x, offset, key);
    j->worker = &x->w;
    x->c.held++;
    return j;
}

/* Intake and engine, the fastest there are. True: there was one. */
static bool run_one(struct world *x)
{
    struct job *j = job_queue_take(&x->w.to_intake, 0);
    if (!j)
        return false;
    assert_null(j->next);
    worker_end_job(&x->w, j, OUTCOME_REPLY);
    return true;
}

/* delivery.order=key: who waits for the one before it waits for this thread, 10 ms at most. */
static void a_key_does_not_wait_for_records(void **state)
{
    (void)state;
    struct world *x = world_open();
    x->c.order = key_order_new();
    int idle = consumer_poll_ms(&x->c);
    assert_in_range(idle, 50, 1000);
    for (int i = 0; i < 3; i++)
        assert_int_equal(consumer_admit(&x->c, deliver(x, i, "k")), LM_OK);
    for (int i = 0; i < 3; i++) {
        assert_in_range(consumer_poll_ms(&x->c), 1, i < 2 ? 10 : idle);
        assert_true(run_one(x));
        consumer_take_finished(&x->c, 0);
    }
    assert_false(run_one(x));
    assert_int_equal(consumer_poll_ms(&x->c), idle);
    key_order_free(x->c.order);
    world_close(x);
}

static void suspects_do_not_either(void **state)
{
    (void)state;
    struct world *x = world_open();
    x->c.iso.busy = true;
    assert_in_range(consumer_poll_ms(&x->c), 1, 10);
    world_close(x);
}

/* All partitions go at once, and one prompt runs on: what ends meanwhile is committed meanwhile,
 * by the map, for a worker that is killed in the drain must not repeat it. */
static void an_eager_revocation_commits_while_it_drains(void **state)
{
    (void)state;
    struct world *x = world_open();
    x->cfg.revoke_drain_ms = 5000;
    x->cfg.commit_interval_ms = 1;
    x->c.commit_queue = rd_kafka_queue_new(x->c.rk);
    lease_ref(x->part.lease);           /* the world's; the consumer gives its own up */
    running = deliver(x, 0, NULL);
    job_set_stage(running, JOB_RUNNING);
    struct job *other = deliver(x, 1, NULL);
    job_set_stage(other, JOB_RUNNING);
    worker_end_job(&x->w, other, OUTCOME_REPLY);
    rd_kafka_topic_partition_list_t *parts = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(parts, "t", 0);
    int64_t start = lm_now_us();
    rebalance_cb(x->c.rk, RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS, parts, &x->c);
    assert_true(lm_now_us() - start < 4000000);         /* the last commit comes after the drain */
    assert_int_equal(commits_meanwhile, 1);
    assert_non_null(strstr(metadata, "0:"));
    assert_true(strlen(metadata) > 4);  /* it has a map */
    rd_kafka_topic_partition_list_destroy(parts);
    job_unref(running);
    running = NULL;
    rd_kafka_queue_destroy(x->c.commit_queue);
    free(x->c.pending);
    world_close(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_key_does_not_wait_for_records), cmocka_unit_test(suspects_do_not_either),
        cmocka_unit_test(an_eager_revocation_commits_while_it_drains),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
