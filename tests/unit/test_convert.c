/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_convert.c - what the CUDA backend makes of a checkpoint's numbers on the host is what the
 * CPU backend makes of them, bit for bit: all float16, all bfloat16, and of float32 every exponent
 * with the mantissas at which rounding turns, and a million others. No GPU is needed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "kernels/cpu/cpu_int.h"
#include "kernels/cuda/convert.h"

#define N 65536

static uint16_t half[N], out[N];
static float wide[N];

static void all_halves(void)
{
    for (int i = 0; i < N; i++)
        half[i] = (uint16_t)i;
}

static bool is_nan16(uint16_t h)
{
    return (h & 0x7fff) > 0x7c00;
}

static void check_f16(const void *src, enum kn_dtype t)
{
    conv_row_f16(out, src, 0, N, t);
    for (int i = 0; i < N; i++) {
        const uint16_t want = cpu_f32_to_f16(wide[i]);
        if (is_nan16(want) ? !is_nan16(out[i]) : out[i] != want)
            fail_msg("%a: %04x, not %04x", (double)wide[i], out[i], want);
    }
}

static void check_f32(void)
{
    check_f16(wide, KN_F32);
    conv_row(out, wide, 0, N, KN_F32);
    for (int i = 0; i < N; i++)
        if (out[i] != cpu_f32_to_bf16(wide[i]))
            fail_msg("%a: %04x, not %04x", (double)wide[i], out[i], cpu_f32_to_bf16(wide[i]));
    for (int i = 0; i < N; i++)
        if (fabsf(wide[i]) <= 448 && conv_e4m3(wide[i]) != cpu_f32_to_e4m3(wide[i]))
            fail_msg("%a: %02x, not %02x", (double)wide[i], conv_e4m3(wide[i]),
                     cpu_f32_to_e4m3(wide[i]));
}

static void float32(void **state)
{
    (void)state;
    uint32_t x = 1;
    int n = 0;
    for (uint32_t top = 0; top < 1u << 12; top++)       /* sign, exponent, 3 bits of mantissa */
        for (uint32_t k = 0; k < 256; k++) {
            const uint32_t edge[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x7ffff, 0x80000,
                                      0x80001, 0xfffff, 0x17fff, 0x18000, 0x18001, 0x10000, 0xfff,
                                      0x1000, 0x1001, 0x2fff, 0x3000, 0x3001 };
            x = x * 1664525 + 1013904223;
            uint32_t low = k < LM_COUNT(edge) ? edge[k] : x >> 12;
            wide[n++] = conv_float(top << 20 | (low & 0xfffff));
            if (n == N) {
                check_f32();
                n = 0;
            }
        }
    assert_int_equal(n, 0);
}

static void halves(void **state)
{
    (void)state;
    all_halves();
    conv_row(out, half, 0, N, KN_F16);
    for (int i = 0; i < N; i++)
        if (out[i] != cpu_f32_to_bf16(cpu_f16_to_f32((uint16_t)i)))
            fail_msg("float16 %04x: %04x", (unsigned)i, out[i]);
    conv_row(out, half, 5, N - 5, KN_BF16);
    for (int i = 5; i < N; i++)
        assert_int_equal(out[i - 5], i);
    conv_row_f16(out, half, 5, N - 5, KN_F16);
    for (int i = 5; i < N; i++)
        assert_int_equal(out[i - 5], i);
    for (int i = 0; i < N; i++)
        wide[i] = cpu_bf16_to_f32(half[i]);
    check_f16(half, KN_BF16);
}

static float element(enum kn_dtype t, int i)
{
    return t == KN_F32 ? wide[i] : t == KN_F16 ? cpu_f16_to_f32(half[i]) : cpu_bf16_to_f32(half[i]);
}

/* Elements [at, at + n) as one row. */
static void check_row(enum kn_dtype t, int at, int n)
{
    static uint8_t e4m3[N];
    float scale = -1, most = 0;
    bool finite = true;
    for (int i = at; i < at + n; i++) {
        finite = finite && isfinite(element(t, i));
        most = fmaxf(most, fabsf(element(t, i)));
    }
    const void *src = t == KN_F32 ? (const void *)wide : (const void *)half;
    assert_int_equal(conv_scaled_row(e4m3, &scale, src, (size_t)at, (size_t)n, t), finite);
    if (!finite)
        return;
    float want = most > 0 ? fmaxf(most / 448, FLT_MIN) : 1;
    assert_true(scale == want);
    for (int i = 0; i < n; i++)
        if (e4m3[i] != cpu_f32_to_e4m3(element(t, at + i) / want))
            fail_msg("element %d of %d: %02x", i, n, e4m3[i]);
}

static void rows_with_a_scale(void **state)
{
    (void)state;
    uint32_t x = 1;
    for (int t = KN_F32; t <= KN_BF16; t++)
        for (int n = 1; n < 3000; n += 1 + n / 3) {
            for (int i = 0; i < n; i++) {
                x = x * 1664525 + 1013904223;
                wide[i] = conv_float((x & 0x80000000) | (0x3a000000 + (x >> 6 & 0x3ffffff)));
                half[i] = (uint16_t)(x >> 16 & (n % 2 ? 0xbfff : 0x8fff));
            }
            check_row((enum kn_dtype)t, 0, n);
            check_row((enum kn_dtype)t, n / 2, n - n / 2);
        }
    all_halves();
    check_row(KN_F16, 0x0001, 64);              /* subnormal */
    check_row(KN_BF16, 0x0000, 2);
    check_row(KN_F16, 0x7bf0, 16);              /* the largest, and then one that is not finite */
    check_row(KN_F16, 0x7bf0, 17);
    check_row(KN_BF16, 0x7f00, 300);
    check_row(KN_BF16, 0x8000, 1);              /* -0 */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(float32),
        cmocka_unit_test(halves),
        cmocka_unit_test(rows_with_a_scale),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
