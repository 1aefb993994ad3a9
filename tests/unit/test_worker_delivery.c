/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_delivery.c - what becomes of a record that is refused: for its size (what it
 * measures, beside what the client library says of it, and whose the verdict is), or as its
 * partition went away under it. Nothing is sent: there is no broker.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/delivery.h"
#include "worker/producer_int.h"

static rd_kafka_t *client(size_t message_max_bytes)
{
    char most[24], why[128];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    snprintf(most, sizeof most, "%zu", message_max_bytes);
    rd_kafka_conf_set(conf, "message.max.bytes", most, why, sizeof why);
    rd_kafka_t *rk = rd_kafka_new(RD_KAFKA_PRODUCER, conf, why, sizeof why);
    assert_non_null(rk);
    return rk;
}

/* A reply of `len` bytes to a record with such a key and one such header, which is echoed. */
static struct job *reply_of(size_t len, size_t key, size_t header)
{
    static char bytes[2000000];
    struct ledger_ref ref = { 0 };
    struct lease *lease = lease_new("prompts", 0, ref);
    struct record r = { .key = key ? bytes : NULL, .key_len = key, .value = "{}", .value_len = 2,
                        .timestamp_ms = -1 };
    struct job *j = NULL;
    assert_int_equal(job_new(lease, &r, &j), LM_OK);
    lease_unref(lease);
    j->out.topic = "replies";
    j->out.partition = -1;
    j->out.len = len;
    j->out.value = bytes;
    j->outcome = OUTCOME_REPLY;
    header_add(&j->out.headers, "kafka_correlationId", bytes, header);
    header_add(&j->out.headers, "empty", NULL, 0);
    return j;
}

/* What the client library, told to take so many bytes, says at once. */
static rd_kafka_resp_err_t said_of(struct job *j, size_t message_max_bytes)
{
    struct worker w = { .cfg = &(struct config){ .topics_replies = (char *)"others" } };
    struct producer p = { .w = &w, .exactly_once = true, .rk = client(message_max_bytes) };
    producer_send_records(&p, j, 0);
    rd_kafka_resp_err_t said = (rd_kafka_resp_err_t)j->out.error;
    rd_kafka_purge(p.rk, RD_KAFKA_PURGE_F_QUEUE);
    rd_kafka_destroy(p.rk);
    return said;
}

/* A record that measures more than batch.size travels alone: so what we measure is never more than
 * what the client library does, nor so much less that it matters. */
static void test_measured_as_the_library_does(void **state)
{
    (void)state;
    static const size_t rows[][3] = { { 5000, 0, 0 }, { 0, 5000, 0 }, { 0, 0, 5000 },
                                      { 560, 3, 1048300 }, { 2000, 700000, 700000 } };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        struct job *j = reply_of(rows[i][0], rows[i][1], rows[i][2]);
        size_t n = producer_record_bytes(j, &j->out);
        assert_true(n > rows[i][0] + rows[i][1] + rows[i][2]);
        assert_int_equal(said_of(j, n), RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE);
        assert_int_equal(said_of(j, n + 200), RD_KAFKA_RESP_ERR_NO_ERROR);
        job_unref(j);
    }
}

/* A small reply with a huge header, alone in its batch and too large: nobody else's batches become
 * smaller, and it is a dead letter at once. */
static void test_a_huge_header_is_its_own_fault(void **state)
{
    (void)state;
    struct config cfg = { .topics_dead_letters = (char *)"dead", .group_id = (char *)"g" };
    struct worker w = { .cfg = &cfg };
    struct producer p = { .w = &w, .exactly_once = true, .rk = client(1000000000),
                          .batch = { .full = 1000000, .bytes = 1000000 } };
    w.producer = &p;
    job_queue_init(&p.inbox);
    struct job *j = reply_of(560, 3, 1048300);
    j->out.error = RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    delivery_judge(&p, j);
    assert_false(batch_size_pending(&p.batch));
    assert_int_equal(j->outcome, OUTCOME_DEAD_LETTER);
    assert_int_equal(j->failure, LM_TOO_LARGE);
    assert_non_null(strstr(j->err->msg, "560 bytes, 1048"));
    job_queue_release(&p.inbox);        /* and the letter in it */
    rd_kafka_destroy(p.rk);
}

/* What waiting does not change is no reply's fate: one that is larger than a segment of its topic's
 * log, and one whose prompt has chosen a topic of an old format. */
static void test_refused_for_good_is_a_dead_letter(void **state)
{
    (void)state;
    static const rd_kafka_resp_err_t errors[] = {
        RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE, RD_KAFKA_RESP_ERR_UNSUPPORTED_FOR_MESSAGE_FORMAT };
    struct config cfg = { .topics_dead_letters = (char *)"dead", .group_id = (char *)"g" };
    struct worker w = { .cfg = &cfg };
    struct producer p = { .w = &w, .exactly_once = true, .rk = client(1000000000),
                          .batch = { .full = 1000000, .bytes = 1000000 } };
    w.producer = &p;
    job_queue_init(&p.inbox);
    for (size_t i = 0; i < LM_COUNT(errors); i++) {
        struct job *j = reply_of(1100000, 0, 0);
        j->out.asked = true;
        j->out.error = errors[i];
        delivery_judge(&p, j);
        assert_int_equal(j->outcome, OUTCOME_DEAD_LETTER);
        assert_int_equal(j->failure, i ? LM_NOT_FOUND : LM_TOO_LARGE);
    }
    job_queue_release(&p.inbox);        /* and the letters in it */
    rd_kafka_destroy(p.rk);
}

/* A record that was on its way when its topic was made again, with fewer partitions, may come back
 * as one that the client destroyed with the partition. That is no end of ours: it goes again, and
 * what follows a stream's first part may go elsewhere. */
static void test_destroyed_with_its_partition_goes_again(void **state)
{
    (void)state;
    struct config cfg = { .retry_backoff_ms = 50, .retry_backoff_max_ms = 1000 };
    struct worker w = { .cfg = &cfg };
    struct producer p = { .w = &w, .rk = client(1000000) };
    struct job *plain = reply_of(10, 0, 0), *final = reply_of(10, 0, 0);
    struct job *part = reply_of(10, 0, 0);
    struct job *all[] = { plain, final, part };
    part->parent = final;
    part->outcome = OUTCOME_PART;
    plain->out.partition = 7;           /* as asked: another try learns if it is there */
    plain->out.asked = true;
    final->out.partition = part->out.partition = 7;
    final->out.follows = part->out.follows = true;
    for (size_t i = 0; i < LM_COUNT(all); i++) {
        all[i]->out.error = RD_KAFKA_RESP_ERR__DESTROY;
        delivery_judge(&p, all[i]);
        assert_int_equal(all[i]->out.attempts, 1);
        assert_int_equal(all[i]->out.partition, all[i] == plain ? 7 : -1);
    }
    size_t waiting = 0;
    for (struct job *j = job_list_take_all(&p.later), *next; j; j = next, waiting++) {
        next = j->next;
        if (j == part)
            j->parent = NULL;
        job_unref(j);
    }
    assert_int_equal(waiting, LM_COUNT(all));
    rd_kafka_destroy(p.rk);
}

/* Only a partition that the prompt has named is its own fault: another one was the client's choice,
 * and the next try makes a better one. */
static void test_a_partition_that_nobody_named_is_no_fault(void **state)
{
    (void)state;
    struct config cfg = { .topics_dead_letters = (char *)"dead", .group_id = (char *)"g",
                          .retry_backoff_ms = 50, .retry_backoff_max_ms = 1000 };
    struct worker w = { .cfg = &cfg };
    struct producer p = { .w = &w, .rk = client(1000000) };
    struct job *any = reply_of(10, 0, 0), *named = reply_of(10, 0, 0);
    any->out.asked = named->out.asked = true;
    any->out.error = RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION;
    delivery_judge(&p, any);
    assert_int_equal(any->outcome, OUTCOME_REPLY);
    assert_ptr_equal(job_list_take_all(&p.later), any);
    w.producer = &p;
    p.exactly_once = true;              /* so that the letter waits to be sent */
    job_queue_init(&p.inbox);
    named->out.partition = 7;
    named->out.error = RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION;
    delivery_judge(&p, named);
    assert_int_equal(named->outcome, OUTCOME_DEAD_LETTER);
    job_queue_release(&p.inbox);        /* and the letter in it */
    job_unref(any);
    rd_kafka_destroy(p.rk);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_measured_as_the_library_does),
        cmocka_unit_test(test_a_huge_header_is_its_own_fault),
        cmocka_unit_test(test_refused_for_good_is_a_dead_letter),
        cmocka_unit_test(test_a_partition_that_nobody_named_is_no_fault),
        cmocka_unit_test(test_destroyed_with_its_partition_goes_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
