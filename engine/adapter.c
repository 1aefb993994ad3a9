/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter.c - from a PEFT folder to a packed image; see adapter.h.
 *
 * Adapters come from stores that we don't trust, and their files may be replaced or cut while we
 * work. So both files are read into memory once, digest and validation see those same bytes, and
 * nothing of the folder is looked at afterwards.
 *
 * Config and tensors must say the same: every module that the config targets has its two tensors,
 * of the model's shape and the module's rank, and no tensor is left over.
 */
#include "engine/adapter.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_internal.h"

#define MAX_CONFIG_BYTES (4u << 20)
#define PREFIX "base_model.model."
#define NAME_CHARS 160

struct files {
    char *config, *weights;
    size_t config_n, weights_n;
};

/* ---- digest ---------------------------------------------------------------------------- */

static bool digest_file(EVP_MD_CTX *md, const char *name, const char *data, size_t n)
{
    uint8_t size[8];
    for (int i = 0; i < 8; i++)
        size[i] = (uint8_t)((uint64_t)n >> (56 - 8 * i));
    return EVP_DigestUpdate(md, name, strlen(name) + 1) &&
           EVP_DigestUpdate(md, size, sizeof size) && EVP_DigestUpdate(md, data, n);
}

static lm_status digest_files(const struct files *f, char out[ENGINE_DIGEST_CHARS],
                              struct lm_err *err)
{
    uint8_t sum[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    bool ok = md && EVP_DigestInit_ex(md, EVP_sha256(), NULL) &&
              digest_file(md, ADAPTER_CONFIG_FILE, f->config, f->config_n) &&
              digest_file(md, ADAPTER_WEIGHTS_FILE, f->weights, f->weights_n) &&
              EVP_DigestFinal_ex(md, sum, &n) && n == 32;
    EVP_MD_CTX_free(md);
    if (!ok)
        return lm_err_set(err, LM_INTERNAL, "SHA-256 is not available");
    memcpy(out, "sha256:", 8);
    lm_hex(sum, n, out + 7);
    return LM_OK;
}

/* ---- files ----------------------------------------------------------------------------- */

static lm_status read_one(const char *dir, const char *name, size_t max, char **out, size_t *n,
                          struct lm_err *err)
{
    char *path = ju_join(dir, name);
    if (!path)
        return lm_err_set(err, LM_NOMEM, "%s: no memory", dir);
    lm_status s = ju_read_file(path, max, out, n, err);
    free(path);
    return s;
}

static lm_status read_files(const char *dir, size_t max_bytes, struct files *f, struct lm_err *err)
{
    memset(f, 0, sizeof *f);
    lm_status s = read_one(dir, ADAPTER_CONFIG_FILE, LM_MIN(max_bytes, MAX_CONFIG_BYTES),
                           &f->config, &f->config_n, err);
    if (!s)
        s = read_one(dir, ADAPTER_WEIGHTS_FILE, max_bytes, &f->weights, &f->weights_n, err);
    return s;
}

static void free_files(struct files *f)
{
    free(f->config);
    free(f->weights);
}

lm_status adapter_digest(const char *dir, char out[ENGINE_DIGEST_CHARS], struct lm_err *err)
{
    struct files f;
    lm_status s = read_files(dir, SIZE_MAX / 4, &f, err);
    if (!s)
        s = digest_files(&f, out, err);
    free_files(&f);
    return s;
}

/* ---- tensors --------------------------------------------------------------------------- */

void adapter_module_shape(const struct model_config *cfg, enum kn_module m, int64_t *in,
                          int64_t *out)
{
    int64_t q = (int64_t)cfg->q_heads * cfg->head_dim, kv = (int64_t)cfg->kv_heads * cfg->head_dim;
    const int64_t outs[KN_MODULES] = {
        [KN_Q] = q, [KN_K] = kv, [KN_V] = kv, [KN_O] = cfg->hidden, [KN_GATE] = cfg->ffn,
        [KN_UP] = cfg->ffn, [KN_DOWN] = cfg->hidden,
    };
    *in = m == KN_O ? q : m == KN_DOWN ? cfg->ffn : cfg->hidden;
    *out = outs[m];
}

static lm_status find_tensor(const safetensors *st, int layer, enum kn_module m, char which,
                             int64_t rows, int64_t cols, int rank, const struct st_tensor **out,
                             struct lm_err *err)
{
    char name[NAME_CHARS];
    snprintf(name, sizeof name, PREFIX "model.layers.%d.%s.lora_%c.weight", layer,
             adapter_module_path[m], which);
    const struct st_tensor *t = safetensors_find(st, name);
    if (!t)
        return lm_err_set(err, LM_MISMATCH, ADAPTER_WEIGHTS_FILE ": tensor %s is missing, though "
                          ADAPTER_CONFIG_FILE " targets its module", name);
    if (!t->is_float)
        return lm_err_set(err, LM_UNSUPPORTED, ADAPTER_WEIGHTS_FILE ": tensor %s has dtype %s (F32,"
                          " F16 and BF16 are supported)", name, t->dtype_name);
    if (t->n_dims != 2)
        return lm_err_set(err, LM_MISMATCH, ADAPTER_WEIGHTS_FILE ": tensor %s has %d dimensions,"
                          " expected 2", name, t->n_dims);
    if (t->shape[0] != rows || t->shape[1] != cols)
        return lm_err_set(err, LM_MISMATCH, ADAPTER_WEIGHTS_FILE ": tensor %s has shape [%lld,"
                          " %lld], expected [%lld, %lld] (rank %d on this base model)", name,
                          (long long)t->shape[0], (long long)t->shape[1], (long long)rows,
                          (long long)cols, rank);
    *out = t;
    return LM_OK;
}

static lm_status bind_tensors(const safetensors *st, const struct model_config *cfg,
                              struct adapter_plan *plan, int *used, struct lm_err *err)
{
    *used = 0;
    for (int l = 0; l < plan->n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            struct adapter_slot *slot = &plan->slots[l][m];
            if (slot->rank == 0)
                continue;
            int64_t in, out;
            adapter_module_shape(cfg, (enum kn_module)m, &in, &out);
            lm_status s = find_tensor(st, l, (enum kn_module)m, 'A', slot->rank, in, slot->rank,
                                      &slot->a, err);
            if (!s)
                s = find_tensor(st, l, (enum kn_module)m, 'B', out, slot->rank, slot->rank,
                                &slot->b, err);
            if (s)
                return s;
            *used += 2;
        }
    }
    return LM_OK;
}

static bool is_used(const struct adapter_plan *plan, const struct st_tensor *t)
{
    for (int l = 0; l < plan->n_layers; l++)
        for (int m = 0; m < KN_MODULES; m++)
            if (plan->slots[l][m].a == t || plan->slots[l][m].b == t)
                return true;
    return false;
}

/* Why a tensor is left over, in words. */
static lm_status refuse_tensor(const char *name, int n_layers, struct lm_err *err)
{
    static const struct {
        const char *part, *why;
    } known[] = {
        { "lora_magnitude_vector", "belongs to DoRA, which is not supported" },
        { "modules_to_save", "belongs to modules_to_save, which is not supported" },
        { "lora_embedding_", "adapts an embedding, which is not supported" },
        { ".lora_A.bias", "is a LoRA bias, which is not supported" },
        { ".lora_B.bias", "is a LoRA bias, which is not supported" },
        { "embed_tokens.", "is an embedding, which an adapter may not bring" },
        { "lm_head.", "belongs to lm_head, which an adapter may not change" },
    };
    for (size_t i = 0; i < LM_COUNT(known); i++)
        if (strstr(name, known[i].part))
            return lm_err_set(err, LM_UNSUPPORTED, ADAPTER_WEIGHTS_FILE ": tensor %.200s %s", name,
                              known[i].why);
    int layer = -1;
    if (sscanf(name, PREFIX "model.layers.%6d.", &layer) == 1 && layer >= n_layers)
        return lm_err_set(err, LM_MISMATCH, ADAPTER_WEIGHTS_FILE ": tensor %.200s is for layer %d,"
                          " the base model has %d layers", name, layer, n_layers);
    return lm_err_set(err, LM_MISMATCH, ADAPTER_WEIGHTS_FILE ": tensor %.200s is of no module that "
                      ADAPTER_CONFIG_FILE " targets", name);
}

static lm_status check_leftover(const safetensors *st, const struct adapter_plan *plan, int used,
                                struct lm_err *err)
{
    if (safetensors_count(st) == used)
        return LM_OK;
    for (int i = 0; i < safetensors_count(st); i++)
        if (!is_used(plan, safetensors_at(st, i)))
            return refuse_tensor(safetensors_at(st, i)->name, plan->n_layers, err);
    return LM_OK;
}

/* ---- all together ---------------------------------------------------------------------- */

static lm_status parse_files(const struct files *f, const struct model_config *cfg,
                             enum kn_dtype lora_dtype, int64_t cell_bytes,
                             const struct adapter_alloc *alloc, struct adapter_image *out,
                             struct lm_err *err)
{
    struct adapter_plan plan = { 0 };
    safetensors *st = NULL;
    int used = 0;
    lm_status s = adapter_config_resolve(f->config, f->config_n, cfg, &plan, err);
    if (!s)
        s = safetensors_open_memory(f->weights, f->weights_n, ADAPTER_WEIGHTS_FILE, &st, err);
    if (!s)
        s = bind_tensors(st, cfg, &plan, &used, err);
    if (!s)
        s = check_leftover(st, &plan, used, err);
    if (!s)
        s = adapter_pack(&plan, cfg, lora_dtype, cell_bytes, alloc, out, err);
    if (!s) {
        s = digest_files(f, out->digest, err);
        if (s)
            adapter_image_release(out, alloc);
    }
    safetensors_close(st);
    adapter_plan_release(&plan);
    return s;
}

lm_status adapter_parse(const char *dir, const struct model_config *cfg, enum kn_dtype lora_dtype,
                        int64_t cell_bytes, size_t max_bytes, const struct adapter_alloc *alloc,
                        struct adapter_image *out, struct lm_err *err)
{
    struct files f;
    memset(out, 0, sizeof *out);
    lm_status s = read_files(dir, LM_MIN(max_bytes, SIZE_MAX / 4), &f, err);
    if (!s) {
        s = parse_files(&f, cfg, lora_dtype, cell_bytes, alloc, out, err);
        if (s)
            lm_err_prefix(err, "%s", dir);
    }
    free_files(&f);
    return s;
}
