/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_base.c - error messages stay printable UTF-8, whatever they quote and wherever they are cut;
 * bytes as text.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>
#include <utf8proc.h>

#include "kernels/base.h"

static bool is_utf8(const char *s)
{
    const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)s;
    for (utf8proc_ssize_t left = (utf8proc_ssize_t)strlen(s), n; left > 0; left -= n, p += n) {
        utf8proc_int32_t c;
        n = utf8proc_iterate(p, left, &c);
        if (n <= 0)
            return false;
    }
    return true;
}

static void expect(const char *quoted, const char *want)
{
    struct lm_err err;
    assert_int_equal(lm_err_set(&err, LM_FORMAT, "%s", quoted), LM_FORMAT);
    assert_string_equal(err.msg, want);
}

static void messages_are_printable(void **state)
{
    (void)state;
    expect("a\n\tb\x7f", "a??b?");
    expect("Gr\xc3\xbc\xc3\x9f" "e \xe2\x82\xac \xf0\x9f\x8e\x89",
           "Gr\xc3\xbc\xc3\x9f" "e \xe2\x82\xac \xf0\x9f\x8e\x89");
    expect("cut \xe2\x82", "cut ??");
    expect("\x80 \xff \xc0\x80 \xc1\xbf", "? ? ?? ??");
    expect("\xe0\x80\x80 \xed\xa0\x80 \xf4\x90\x80\x80", "??? ??? ????");
    expect("\xf0\x9f\x8e", "???");
    expect("\xc3(", "?(");
}

/* Every two- and three-byte start, against a library that knows. */
static void agrees_with_utf8proc(void **state)
{
    (void)state;
    for (int a = 0x80; a < 256; a++)
        for (int b = 1; b < 256; b++)
            for (int c = 0x70; c < 256; c += 0x10) {
                char s[] = { (char)a, (char)b, (char)c, (char)0x80, 0 };
                struct lm_err err;
                lm_err_set(&err, LM_FORMAT, "%s", s);
                assert_true(is_utf8(err.msg));
                if (is_utf8(s) && b >= 0x80)
                    assert_string_equal(err.msg, s);
            }
}

/* A message cut by its buffer, with the cut inside a character, and a prefix put before it. */
static void bytes_as_hex(void **state)
{
    (void)state;
    char out[9] = "........";
    lm_hex("\x00\x9f\xff", 3, out);
    assert_string_equal(out, "009fff");
    lm_hex("", 0, out);
    assert_string_equal(out, "");
}

static void cut_messages_stay_whole(void **state)
{
    (void)state;
    for (int pad = 0; pad < 4; pad++) {
        char text[2048];
        struct lm_err err;
        memset(text, 'x', (size_t)pad);
        for (size_t i = (size_t)pad; i + 3 < sizeof text; i += 3)
            memcpy(text + i, "\xe2\x82\xac", 4);
        lm_err_set(&err, LM_FORMAT, "%s", text);
        assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
        assert_true(is_utf8(err.msg));
        lm_err_prefix(&err, "where %d", pad);
        assert_true(is_utf8(err.msg));
        assert_non_null(strstr(err.msg, "where"));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_are_printable),
        cmocka_unit_test(agrees_with_utf8proc),
        cmocka_unit_test(cut_messages_stay_whole),
        cmocka_unit_test(bytes_as_hex),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
