/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_adapter_pack.c - what an adapter costs is its own ranks and layers: packing wastes little,
 * over random shapes (grouped-query attention, wide feed-forward matrices, 1 to 80 layers), block
 * sizes, dtypes, and ranks that differ from layer to layer and module to module.
 *
 *   waste         whenever 16 columns of every matrix fit an eighth of a cell (rank 64 and bf16: a
 *                 cell of 16 KiB): of the cells, below an eighth of the payload, one cell for each
 *                 targeted layer, and the directory; hence below one block (a cell of every layer)
 *                 for each targeted layer and the rest of the last block, unless a layer of the
 *                 adapter takes more than eight blocks, which in no real model it does
 *   proportion    a layer or module that is not targeted takes a directory entry and nothing else;
 *                 twice the rank takes twice the bytes, but for that waste
 *   real models   the shapes of ops/shapes at ranks of 4 to 256, in percent; none of them takes
 *                 more than 5 percent beyond its weights, those of a power of two 3
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_internal.h"
#include "rnd.h"

#define CASES 4000
#define MAX_LAYERS 80

struct setting {
    struct model_config model;
    struct adapter_plan plan;
    struct adapter_slot slots[MAX_LAYERS][KN_MODULES];
    enum kn_dtype dtype;
    int64_t cell;
};

static void make_setting(struct setting *s)
{
    static const int dims[] = { 16, 32, 64, 80, 96, 128 };
    int kv = 1 << rnd(4), group = 1 + rnd(8), dim = dims[rnd(6)];
    memset(s, 0, sizeof *s);
    s->dtype = rnd(2) ? KN_BF16 : KN_F32;
    s->model = (struct model_config){ .n_layers = 1 + rnd(MAX_LAYERS), .kv_heads = kv,
                                      .q_heads = kv * group, .head_dim = dim };
    s->model.hidden = kv * group * dim;
    s->model.ffn = s->model.hidden / 2 * (1 + rnd(16)) + rnd(5) * 8;
    s->cell = (int64_t)(8 << rnd(4)) * 2 * kv * dim * (int64_t)kn_dtype_size(s->dtype);
    s->plan = (struct adapter_plan){ .n_layers = s->model.n_layers, .slots = s->slots };
    int usual = 1 + rnd(rnd(4) ? 64 : 128);
    for (int l = 0; l < s->model.n_layers; l++)
        for (int m = 0; m < KN_MODULES; m++)
            if (rnd(5) > 0)
                s->slots[l][m] = (struct adapter_slot){ .scale = 1,
                                                        .rank = rnd(6) ? usual : 1 + rnd(64) };
    if (rnd(3) == 0)                    /* few layers */
        for (int l = 0; l < s->model.n_layers; l++)
            if (rnd(4))
                memset(s->slots[l], 0, sizeof s->slots[l]);
}

/* Bytes of its own weights; how many layers have any; and whether its ranks are small against a
 * cell. */
static int64_t payload(const struct setting *s, int *targeted, bool *small)
{
    int64_t sum = 0, in, out;
    *targeted = 0;
    *small = true;
    for (int l = 0; l < s->model.n_layers; l++) {
        bool any = false;
        for (int m = 0; m < KN_MODULES; m++) {
            int64_t column = s->slots[l][m].rank * (int64_t)kn_dtype_size(s->dtype);
            adapter_module_shape(&s->model, (enum kn_module)m, &in, &out);
            sum += column * (in + out);
            any |= column > 0;
            *small = *small && column * 16 <= s->cell / 8;
        }
        *targeted += any;
    }
    return sum;
}

static int64_t directory(const struct setting *s)
{
    return LM_DIV_UP(s->model.n_layers, s->cell / (int64_t)sizeof(struct kn_lora_row)) * s->cell;
}

static bool pack(const struct setting *s, struct adapter_image *img)
{
    struct lm_err err;
    lm_status st = adapter_pack_size(&s->plan, &s->model, s->dtype, s->cell, img, &err);
    if (st != LM_OK && st != LM_TOO_LARGE && st != LM_INVALID)
        fail_msg("%s", err.msg);
    return st == LM_OK;
}

static void waste_is_below_a_block_a_layer(void **state)
{
    (void)state;
    static struct setting s;
    struct adapter_image img;
    int packed = 0, n_small = 0;
    double worst = 0;
    for (int i = 0; i < CASES; i++) {
        int targeted;
        bool small;
        make_setting(&s);
        int64_t own = payload(&s, &targeted, &small);
        if (targeted == 0 || !pack(&s, &img))
            continue;
        int64_t block = s.cell * s.model.n_layers;
        int64_t blocks = LM_DIV_UP(img.n_cells, s.model.n_layers);
        packed++;
        if (!small)
            continue;
        bool usual = own <= 8 * targeted * block;
        if (usual && blocks * block - own >= (targeted + 1) * block)
            fail_msg("case %d: %lld blocks of %lld bytes for %lld, %d layers", i,
                     (long long)blocks, (long long)block, (long long)own, targeted);
        n_small++;
        int64_t waste = img.n_cells * s.cell - own - directory(&s);
        worst = LM_MAX(worst, (double)(waste - own / 8) / (double)s.cell / targeted);
        if (waste >= targeted * s.cell + own / 8 + s.cell)
            fail_msg("case %d: %d cells of %lld bytes for %lld, %d layers", i, img.n_cells,
                     (long long)s.cell, (long long)own, targeted);
    }
    print_message("%d adapters packed, %d of small ranks; beyond an eighth at most %.2f cells a "
                  "layer are lost\n", packed, n_small, worst);
    assert_true(packed > CASES / 2 && n_small > CASES / 4);
}

static void what_is_not_targeted_costs_nothing(void **state)
{
    (void)state;
    static struct setting s;
    struct adapter_image all, less;
    for (int i = 0; i < CASES; i++) {
        int targeted;
        bool small;
        make_setting(&s);
        payload(&s, &targeted, &small);
        if (targeted == 0 || !small || !pack(&s, &all))
            continue;
        int l = rnd(s.model.n_layers);
        struct adapter_slot kept[KN_MODULES];
        memcpy(kept, s.slots[l], sizeof kept);
        int64_t own = payload(&s, &targeted, &small);
        memset(s.slots[l], 0, sizeof s.slots[l]);
        int64_t rest = payload(&s, &targeted, &small);
        assert_true(pack(&s, &less));
        int64_t saved = (int64_t)(all.n_cells - less.n_cells) * s.cell;
        /* Later matrices may fall a little worse into their cells. */
        assert_true(saved + s.cell + rest / 8 >= own - rest);
    }
}

/* Percent beyond its own weights. */
static double beyond(const char *shape, int rank, int block_tokens)
{
    static struct setting s;
    struct lm_err err;
    struct adapter_image img;
    int targeted;
    bool small;
    memset(&s, 0, sizeof s);
    if (model_config_load_file(shape, &s.model, &err) != LM_OK)
        fail_msg("%s", err.msg);
    s.dtype = KN_BF16;
    s.cell = (int64_t)block_tokens * 2 * s.model.kv_heads * s.model.head_dim * 2;
    s.plan = (struct adapter_plan){ .n_layers = s.model.n_layers, .slots = s.slots };
    for (int l = 0; l < s.model.n_layers; l++)
        for (int m = 0; m < KN_MODULES; m++)
            s.slots[l][m] = (struct adapter_slot){ .rank = rank, .scale = 1 };
    int64_t own = payload(&s, &targeted, &small);
    assert_true(pack(&s, &img));
    model_config_release(&s.model);
    return 100.0 * (double)(img.n_cells * s.cell - own) / (double)own;
}

static void real_models_waste_percents(void **state)
{
    (void)state;
    static const char *const shapes[] = { "llama-2-7b", "llama-2-13b", "llama-3.1-8b",
                                          "qwen2.5-7b", "mistral-7b", "llama-3.1-70b" };
    static const int ranks[] = { 4, 8, 16, 24, 32, 48, 64, 100, 128, 256 };
    for (int i = 0; i < (int)LM_COUNT(shapes); i++) {
        char path[64];
        double most = 0, power = 0;
        snprintf(path, sizeof path, "ops/shapes/%s.json", shapes[i]);
        for (int k = 0; k < (int)LM_COUNT(ranks); k++) {
            double b = beyond(path, ranks[k], 16);
            most = LM_MAX(most, b);
            if ((ranks[k] & (ranks[k] - 1)) == 0)
                power = LM_MAX(power, b);
        }
        print_message("%s: at most %.1f %% beyond the weights, ranks of a power of two %.1f %%\n",
                      shapes[i], most, power);
        assert_true(most < 5 && power < 3);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(waste_is_below_a_block_a_layer),
        cmocka_unit_test(what_is_not_targeted_costs_nothing),
        cmocka_unit_test(real_models_waste_percents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
