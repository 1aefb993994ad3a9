/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_stream.c - the text of a streamed reply between engine and broker: whatever the
 * order of gathering, taking and giving back, the parts together are the text, each byte once.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/stream.h"

static void add(struct stream *s, int choice, const char *text)
{
    assert_int_equal(stream_add(s, choice, lm_strdup(text), strlen(text)), LM_OK);
}

/* A model may say U+0000, which is a character like any other. */
static void test_text_with_nul(void **state)
{
    (void)state;
    static const char piece[] = "a\0b";
    struct stream *s = stream_new(1);
    for (int i = 0; i < 2; i++)
        assert_int_equal(stream_add(s, 0, lm_strndup(piece, 3), 3), LM_OK);
    struct engine_result *r = stream_take(s);
    assert_int_equal(stream_add(s, 0, lm_strndup("\0", 1), 1), LM_OK);
    stream_give_back(s, r);
    r = stream_take(s);
    assert_int_equal(r->choices[0].text_len, 7);
    assert_memory_equal(r->choices[0].text, "a\0ba\0b\0", 8);
    engine_result_free(r);
    stream_free(s);
}

static void test_text_gathers(void **state)
{
    (void)state;
    struct stream *s = stream_new(2);
    assert_false(stream_has_text(s));
    assert_int_equal(strlen(s->generation), 16);
    add(s, 0, "one ");
    add(s, 0, "two");
    add(s, 1, "uno");
    add(s, 2, "nobody");
    add(s, -1, "nobody");
    assert_true(stream_has_text(s));
    struct engine_result *r = stream_take(s);
    assert_int_equal(r->n_choices, 2);
    assert_string_equal(r->choices[0].text, "one two");
    assert_int_equal(r->choices[0].text_len, 7);
    assert_string_equal(r->choices[1].text, "uno");
    assert_int_equal(r->choices[1].index, 1);
    assert_false(stream_has_text(s));
    engine_result_free(r);
    add(s, 1, "dos");
    r = stream_take(s);
    assert_int_equal(r->n_choices, 1);
    assert_int_equal(r->choices[0].index, 1);
    engine_result_free(r);
    stream_free(s);
}

static void test_given_back_comes_first(void **state)
{
    (void)state;
    struct stream *s = stream_new(1);
    add(s, 0, "a");
    struct engine_result *r = stream_take(s);
    add(s, 0, "b");
    stream_give_back(s, r);
    add(s, 0, "c");
    r = stream_take(s);
    assert_string_equal(r->choices[0].text, "abc");
    engine_result_free(r);
    stream_free(s);
}

static void test_restart_is_another_generation(void **state)
{
    (void)state;
    struct stream *s = stream_new(1);
    char before[17];
    memcpy(before, s->generation, sizeof before);
    s->seq = 4;
    s->ended = true;
    add(s, 0, "lost");
    stream_restart(s);
    assert_string_not_equal(before, s->generation);
    assert_int_equal(s->seq, 0);
    assert_false(s->ended);
    assert_false(stream_has_text(s));
    s->broken = true;
    add(s, 0, "not wanted any more");
    assert_false(stream_has_text(s));
    stream_free(s);
    stream_free(NULL);
}

/* Random histories against a plain concatenation. */
static void test_random_histories(void **state)
{
    (void)state;
    uint64_t seed = 0x5eed;
    for (int run = 0; run < 2000; run++) {
        struct stream *s = stream_new(3);
        char want[3][512] = { "" }, got[3][512] = { "" };
        for (int step = 0; step < 60; step++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            unsigned dice = (unsigned)(seed >> 33);
            if (dice % 3) {
                char text[8] = { (char)('a' + dice % 26), (char)('0' + step % 10), 0 };
                text[dice / 8 % 3] = '\0';
                strcat(want[dice / 64 % 3], text);
                add(s, (int)(dice / 64 % 3), text);
                continue;
            }
            struct engine_result *r = stream_take(s);
            if (dice / 4 % 2) {
                stream_give_back(s, r);
                continue;
            }
            for (int i = 0; i < r->n_choices; i++)
                strcat(got[r->choices[i].index], r->choices[i].text);
            engine_result_free(r);
        }
        struct engine_result *r = stream_take(s);
        for (int i = 0; i < r->n_choices; i++)
            strcat(got[r->choices[i].index], r->choices[i].text);
        engine_result_free(r);
        for (int i = 0; i < 3; i++)
            assert_string_equal(got[i], want[i]);
        stream_free(s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text_gathers), cmocka_unit_test(test_text_with_nul),
        cmocka_unit_test(test_given_back_comes_first),
        cmocka_unit_test(test_restart_is_another_generation),
        cmocka_unit_test(test_random_histories),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
