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
#include <string.h>

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
    c.own_rows = cc == 90 ? 32 : 8;
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

/* What kernels report of one sequence of `len` positions, the last 40 of which are queries, whose 3
 * blocks of 16 tokens are `table`: 0, or what is wrong with it. V is zeros, and so is the output,
 * from whatever block. */
static int fault_of(int cc, int head_dim, int len, const int32_t table[3])
{
    enum { HEADS = 2, BLOCKS = 3, BT = 16, N_Q = 40 };
    const size_t n = (size_t)N_Q * HEADS * (size_t)head_dim;
    kn_device *emu = emu_device_new(2, cc);
    kn_stream *s = NULL;
    const int32_t start[] = { 0, N_Q }, kv_len[] = { len };
    assert_int_equal(kn_stream_new(emu, &s, NULL), LM_OK);
    uint16_t *out = aligned_alloc(64, n * 2), *qkv = aligned_alloc(64, n * 3 * 2);
    size_t bytes = kn_kv_block_bytes(emu, KN_KV_NATIVE, BT, HEADS, head_dim);
    void *pool = aligned_alloc(64, BLOCKS * bytes);
    memset(pool, 0, BLOCKS * bytes);
    memset(qkv, 0, n * 3 * 2);
    memset(out, 0xff, n * 2);
    struct kn_attention a = {
        .out = out, .qkv = qkv, .ld = HEADS * 3 * head_dim, .q_start = start, .kv_len = kv_len,
        .block_table = table, .table_ld = BLOCKS, .n_seqs = 1, .n_tok = N_Q, .max_q = N_Q,
        .max_kv = BLOCKS * BT, .block_tokens = BT, .q_heads = HEADS, .kv_heads = HEADS,
        .head_dim = head_dim, .scale = 1,
        .pool = { .base = pool, .num_blocks = BLOCKS, .n_layers = 1,
                  .block_bytes = (int64_t)bytes },
    };
    assert_int_equal(kn_op_attention(s, &a), LM_OK);
    int fault = emu_take_fault();
    for (size_t i = 0; len <= BLOCKS * BT && i < n; i++)
        assert_int_equal(out[i] & 0x7fff, 0);
    free(out), free(qkv), free(pool);
    kn_stream_free(s);
    kn_close(emu);
    return fault;
}

/* A block outside of the pool, or a sequence longer than its table, is reported, never followed. */
static void wrong_blocks(void **state)
{
    static const int32_t good[] = { 2, 0, 1 }, beyond[] = { 2, 3, 1 }, below[] = { -1, 0, 1 };
    static const int32_t far[] = { 2, 0, INT32_MAX };
    (void)state;
    for (int cc = 80; cc <= 90; cc += 10)
        for (int hd = 32; hd <= 128; hd *= 2) {
            assert_int_equal(fault_of(cc, hd, 48, good), 0);
            assert_int_not_equal(fault_of(cc, hd, 48, beyond), 0);
            assert_int_not_equal(fault_of(cc, hd, 48, below), 0);
            assert_int_not_equal(fault_of(cc, hd, 49, good), 0);
            assert_int_not_equal(fault_of(cc, hd, 48, far), 0);
        }
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

static void company(void **state)
{
    (void)state;
    run(twin_company, 80);
    run(twin_company, 90);
}

static void gate_up(void **state)
{
    (void)state;
    run(twin_gate_up, 80);
}

static void gate_up_hopper(void **state)
{
    (void)state;
    run(twin_gate_up, 90);
    run(twin_gate_up_boxes, 90);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_hopper),
        cmocka_unit_test(wrong_blocks),
        cmocka_unit_test(lora),
        cmocka_unit_test(sample),
        cmocka_unit_test(rows),
        cmocka_unit_test(gemm_fp8),
        cmocka_unit_test(company),
        cmocka_unit_test(gate_up),
        cmocka_unit_test(gate_up_hopper),
        cmocka_unit_test(gemm_x_e4m3),
        cmocka_unit_test(gemm_f16),
    };
    return cmocka_run_group_tests_name("kernels: cuda, emulated", tests, NULL, NULL);
}
