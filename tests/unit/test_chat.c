/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_chat.c - chat templates against transformers' apply_chat_template.
 *
 * tests/fixtures/tokenizers/chat.py recorded what transformers renders for each family's template
 * and a set of conversations; null stands for an exception of the template. Run from the root.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/chat_internal.h"

#define ROOT "tests/fixtures/tokenizers/"
#define MAX_MESSAGES 8

struct folder {
    char dir[64];
};

static void make_folder(struct folder *f)
{
    strcpy(f->dir, "/tmp/loramill-chat-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
}

static void write_file(const struct folder *f, const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", f->dir, name);
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    fwrite(text, 1, strlen(text), out);
    fclose(out);
}

static void remove_folder(const struct folder *f)
{
    static const char *const names[] = {"tokenizer_config.json", "chat_template.jinja",
                                        "chat_template.json", "special_tokens_map.json"};
    char path[128];
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        snprintf(path, sizeof path, "%s/%s", f->dir, names[i]);
        unlink(path);
    }
    assert_int_equal(rmdir(f->dir), 0);
}

/* A template in tokenizer_config.json, with <s> and </s>. */
static chat_template *load_text(json_t *template_value)
{
    struct folder f;
    struct lm_err err = {0};
    chat_template *c = NULL;
    make_folder(&f);
    json_t *config = json_pack("{s:s, s:{s:s}, s:O}", "bos_token", "<s>", "eos_token", "content",
                               "</s>", "chat_template", template_value);
    char *text = json_dumps(config, 0);
    write_file(&f, "tokenizer_config.json", text);
    free(text);
    json_decref(config);
    if (chat_template_load(f.dir, &c, &err))
        fail_msg("%s", err.msg);
    remove_folder(&f);
    return c;
}

static int conversation(json_t *j, struct engine_message *m)
{
    size_t i;
    json_t *v;
    assert_true(json_array_size(j) <= MAX_MESSAGES);
    json_array_foreach(j, i, v) {
        m[i].role = json_string_value(json_array_get(v, 0));
        m[i].content = json_string_value(json_array_get(v, 1));
    }
    return (int)json_array_size(j);
}

static time_t march_7th_2025(void)
{
    struct tm tm = {.tm_year = 125, .tm_mon = 2, .tm_mday = 7, .tm_hour = 12, .tm_isdst = -1};
    return mktime(&tm);
}

static json_t *fixture(void)
{
    json_t *all = json_load_file(ROOT "chat.json", JSON_ALLOW_NUL, NULL);
    assert_non_null(all);
    return all;
}

static int compare(const chat_template *c, json_t *talk, json_t *want, const char *name)
{
    struct engine_message m[MAX_MESSAGES];
    struct lm_err err = {0};
    char *got = NULL;
    int n = conversation(talk, m);
    lm_status st = chat_render_at(c, m, n, march_7th_2025(), &got, &err);
    bool same = json_is_null(want) ? st == LM_INVALID && err.msg[0]
                                   : !st && strcmp(got, json_string_value(want)) == 0;
    if (!same) {
        char *show = json_dumps(talk, 0);
        fprintf(stderr, "%s %s\n want: %s\n got:  %s\n", name, show,
                json_is_null(want) ? "(error)" : json_string_value(want), st ? err.msg : got);
        free(show);
    }
    free(got);
    return !same;
}

static void rendering_equals_transformers(void **state)
{
    (void)state;
    json_t *all = fixture(), *k, *talk;
    json_t *talks = json_object_get(all, "conversations");
    size_t i, t;
    int bad = 0, done = 0;
    json_array_foreach(json_object_get(all, "known"), i, k) {
        const char *name = json_string_value(json_object_get(k, "name"));
        const char *family = json_string_value(json_object_get(k, "family"));
        chat_template *c = load_text(json_object_get(k, "template"));
        if (!chat_template_family(c) || strcmp(chat_template_family(c), family) != 0) {
            fprintf(stderr, "%s is not recognised as %s\n", name, family);
            bad++;
        } else {
            json_array_foreach(talks, t, talk) {
                bad += compare(c, talk, json_array_get(json_object_get(k, "texts"), t), name);
                done++;
            }
        }
        chat_template_free(c);
    }
    json_decref(all);
    assert_int_equal(bad, 0);
    assert_true(done > 300);
}

static void unknown_templates_are_refused_by_what_they_begin_with(void **state)
{
    (void)state;
    json_t *all = fixture(), *k;
    const struct engine_message hello = {"user", "hello"};
    size_t i;
    json_array_foreach(json_object_get(all, "unknown"), i, k) {
        chat_template *c = load_text(json_object_get(k, "template"));
        struct lm_err err = {0};
        char *text = NULL;
        if (chat_template_family(c))
            fail_msg("%s was taken for %s", json_string_value(json_object_get(k, "name")),
                     chat_template_family(c));
        assert_int_equal(chat_render(c, &hello, 1, &text, &err), LM_UNSUPPORTED);
        assert_non_null(strstr(err.msg, "begins with"));
        assert_null(text);
        chat_template_free(c);
    }
    json_decref(all);
}

static void bad_messages_have_clear_errors(void **state)
{
    (void)state;
    static const struct {
        struct engine_message m;
        const char *says;
    } cases[] = {
        {{"tool", "x"}, "role \"tool\" is unknown"},
        {{"", "x"}, "is unknown"},
        {{NULL, "x"}, "lacks role or content"},
        {{"user", NULL}, "lacks role or content"},
        {{"user", "a\xFFz"}, "not UTF-8 at byte 1"},
        {{"user", "\xED\xA0\x80"}, "not UTF-8 at byte 0"},
    };
    json_t *all = fixture(), *k;
    size_t i;
    json_array_foreach(json_object_get(all, "known"), i, k) {
        chat_template *c = load_text(json_object_get(k, "template"));
        for (size_t b = 0; b < LM_COUNT(cases); b++) {
            struct lm_err err = {0};
            char *text = NULL;
            lm_status st = chat_render(c, &cases[b].m, 1, &text, &err);
            assert_int_equal(st, strstr(cases[b].says, "UTF-8") ? LM_FORMAT : LM_INVALID);
            assert_non_null(strstr(err.msg, cases[b].says));
        }
        char *text = NULL;
        assert_int_equal(chat_render(c, NULL, 0, &text, NULL), LM_INVALID);
        chat_template_free(c);
    }
    json_decref(all);
}

/* ---- where templates lie ----------------------------------------------------------------- */

#define PLAIN "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + " \
              "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}" \
              "{{ '<|im_start|>assistant\\n' }}"
#define OTHER "{{ 'something else' }}"

static void expect_family(const struct folder *f, const char *family)
{
    chat_template *c = NULL;
    struct lm_err err = {0};
    if (chat_template_load(f->dir, &c, &err))
        fail_msg("%s", err.msg);
    if (family)
        assert_string_equal(chat_template_family(c), family);
    else
        assert_null(chat_template_family(c));
    chat_template_free(c);
}

static void the_jinja_file_goes_before_the_config(void **state)
{
    (void)state;
    struct folder f;
    make_folder(&f);
    expect_family(&f, NULL);
    json_t *j = json_pack("{s:s}", "chat_template", PLAIN);
    char *text = json_dumps(j, 0);
    write_file(&f, "chat_template.json", text);
    expect_family(&f, "chatml");
    write_file(&f, "tokenizer_config.json", "{\"chat_template\": \"" OTHER "\"}");
    expect_family(&f, NULL);
    write_file(&f, "chat_template.jinja", PLAIN "\n");
    expect_family(&f, "chatml");
    free(text);
    json_decref(j);
    remove_folder(&f);
}

static void of_a_list_the_default_counts(void **state)
{
    (void)state;
    json_t *list = json_pack("[{s:s, s:s}, {s:s, s:s}]", "name", "tool_use", "template", OTHER,
                             "name", "default", "template", PLAIN);
    chat_template *c = load_text(list);
    assert_string_equal(chat_template_family(c), "chatml");
    chat_template_free(c);
    json_decref(list);
}

static void a_missing_template_and_bad_files_are_told_apart(void **state)
{
    (void)state;
    struct folder f;
    struct lm_err err = {0};
    chat_template *c = NULL;
    char *text = NULL;
    const struct engine_message hello = {"user", "hello"};
    make_folder(&f);
    write_file(&f, "tokenizer_config.json", "{}");
    assert_int_equal(chat_template_load(f.dir, &c, &err), LM_OK);
    assert_int_equal(chat_render(c, &hello, 1, &text, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "no chat template"));
    chat_template_free(c);
    write_file(&f, "tokenizer_config.json", "{\"chat_template\": ");
    assert_int_equal(chat_template_load(f.dir, &c, &err), LM_FORMAT);
    assert_non_null(strstr(err.msg, "tokenizer_config.json"));
    write_file(&f, "tokenizer_config.json", "[]");
    assert_int_equal(chat_template_load(f.dir, &c, &err), LM_FORMAT);
    remove_folder(&f);
}

static void a_template_that_needs_a_token_the_model_lacks_says_so(void **state)
{
    (void)state;
    json_t *all = fixture();
    json_t *llama2 = json_array_get(json_object_get(all, "known"), 0);
    struct folder f;
    struct lm_err err = {0};
    chat_template *c = NULL;
    char *text = NULL;
    const struct engine_message hello = {"user", "hello"};
    make_folder(&f);
    write_file(&f, "chat_template.jinja",
               json_string_value(json_object_get(llama2, "template")));
    assert_int_equal(chat_template_load(f.dir, &c, &err), LM_OK);
    assert_int_equal(chat_render(c, &hello, 1, &text, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "bos_token"));
    chat_template_free(c);
    write_file(&f, "special_tokens_map.json", "{\"bos_token\": {\"content\": \"<b>\"}}");
    assert_int_equal(chat_template_load(f.dir, &c, &err), LM_OK);
    assert_int_equal(chat_render(c, &hello, 1, &text, &err), LM_OK);
    assert_string_equal(text, "<b>[INST] hello [/INST]");
    free(text);
    chat_template_free(c);
    remove_folder(&f);
    json_decref(all);
}

/* Special tokens of the template are found, and the BOS stands once. */
static void encoding_adds_nothing_to_the_rendered_text(void **state)
{
    (void)state;
    json_t *all = fixture(), *k;
    size_t i;
    tokenizer *t = NULL;
    const struct engine_message hello = {"user", "hello"};
    struct token_ids ids = {0}, plain = {0};
    assert_int_equal(tokenizer_load(ROOT "mistral", &t, NULL), LM_OK);
    json_array_foreach(json_object_get(all, "known"), i, k) {
        if (strcmp(json_string_value(json_object_get(k, "name")), "mistral-v3") != 0)
            continue;
        chat_template *c = load_text(json_object_get(k, "template"));
        assert_int_equal(chat_encode(c, t, &hello, 1, &ids, NULL), LM_OK);
        chat_template_free(c);
    }
    assert_int_equal(tokenizer_encode(t, "<s>[INST] hello[/INST]", 22, false, &plain, NULL), LM_OK);
    assert_int_equal(ids.n, plain.n);
    assert_memory_equal(ids.id, plain.id, (size_t)ids.n * sizeof *ids.id);
    assert_int_equal(ids.id[0], tokenizer_token_id(t, "<s>"));
    assert_int_equal(ids.id[1], tokenizer_token_id(t, "[INST]"));
    assert_true(ids.id[2] != ids.id[0]);
    token_ids_release(&ids);
    token_ids_release(&plain);
    tokenizer_free(t);
    json_decref(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rendering_equals_transformers),
        cmocka_unit_test(unknown_templates_are_refused_by_what_they_begin_with),
        cmocka_unit_test(bad_messages_have_clear_errors),
        cmocka_unit_test(the_jinja_file_goes_before_the_config),
        cmocka_unit_test(of_a_list_the_default_counts),
        cmocka_unit_test(a_missing_template_and_bad_files_are_told_apart),
        cmocka_unit_test(a_template_that_needs_a_token_the_model_lacks_says_so),
        cmocka_unit_test(encoding_adds_nothing_to_the_rendered_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
