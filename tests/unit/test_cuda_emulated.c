/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CUDA kernels without a device: their own source, run by the emulator of tests/emu, against
 * the CPU twin. Settles indexing, masks, barriers and merging; what only a device can show (speed,
 * memory ordering, the tensor cores' own rounding) is for `make gpu-check`.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/emu/emu_backend.h"
#include "tests/twin/twin.h"

static void run(bool (*check)(struct twin *), int cc)
{
    struct twin c;
    struct kn_open_params one = { .threads = 1 };
    kn_device *emu = emu_device_new(8, cc), *cpu = NULL;
    assert_int_equal(kn_open("cpu", &one, &cpu, NULL), LM_OK);
    assert_true(twin_open(&c, emu, cpu));
    c.slow = true;
    assert_true(check(&c));
    twin_close(&c);
    kn_close(emu);
    kn_close(cpu);
}

static void attention(void **state)
{
    (void)state;
    run(twin_attention, 80);
}

static void attention_hopper(void **state)
{
    (void)state;
    run(twin_attention, 90);
}

static void lora(void **state)
{
    (void)state;
    run(twin_lora, 80);
}

static void sample(void **state)
{
    (void)state;
    run(twin_sample, 80);
}

static void rows(void **state)
{
    (void)state;
    run(twin_rows, 80);
}

static void gemm_fp8(void **state)
{
    (void)state;
    run(twin_gemm_fp8, 80);
}

static void gemm_x_e4m3(void **state)
{
    (void)state;
    run(twin_gemm_x_e4m3, 90);
}

static void gemm_f16(void **state)
{
    (void)state;
    run(twin_gemm_f16, 80);
}

static void gate_up(void **state)
{
    (void)state;
    run(twin_gate_up, 80);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_hopper),
        cmocka_unit_test(lora),
        cmocka_unit_test(sample),
        cmocka_unit_test(rows),
        cmocka_unit_test(gemm_fp8),
        cmocka_unit_test(gate_up),
        cmocka_unit_test(gemm_x_e4m3),
        cmocka_unit_test(gemm_f16),
    };
    return cmocka_run_group_tests_name("kernels: cuda, emulated", tests, NULL, NULL);
}
