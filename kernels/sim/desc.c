/* SPDX-License-Identifier: Apache-2.0 */
/*
 * desc.c - reads the description of a device: one flat JSON object, every key demanded, none
 * unknown, every number within bounds, so that a typo can't become a free kernel.
 *
 * Curves are a number, or a list of [x, y] points with rising x.
 */
#include <jansson.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "kernels/sim/sim_int.h"

enum field_type { NUMBER, FLAG, CURVE, DTYPE };

struct field {
    const char *key;
    enum field_type type;
    size_t offset;
    double lo, hi;
};

#define F(member, type, lo, hi) { #member, type, offsetof(struct sim_desc, member), lo, hi }

static const struct field fields[] = {
    F(act, DTYPE, 0, 0), F(kv, DTYPE, 0, 0), F(lora, DTYPE, 0, 0),
    F(memory_gb, NUMBER, 1e-6, 1e6), F(bandwidth_gbps, NUMBER, 1e-3, 1e6),
    F(element_share, NUMBER, 1e-3, 1),
    F(gemm_tflops, CURVE, 1e-6, 1e6), F(gemm_gbps, CURVE, 1e-3, 1e6), F(gemm_norm, NUMBER, 1, 64),
    F(decode_share, NUMBER, 1e-3, 1), F(prefill_tflops, NUMBER, 1e-6, 1e6),
    F(shrink_share, NUMBER, 1e-4, 1), F(expand_share, NUMBER, 1e-4, 1),
    F(lora_tflops, NUMBER, 1e-6, 1e6), F(lora_us, NUMBER, 0, 1e6),
    F(lora_token_gbps, NUMBER, 0, 1e6),
    F(gap_us, NUMBER, 0, 1e6), F(graph, FLAG, 0, 0), F(launch_us, NUMBER, 0, 1e6),
    F(step_us, NUMBER, 0, 1e6), F(seq_us, NUMBER, 0, 1e6),
    F(in_gbps, NUMBER, 1e-3, 1e6), F(out_gbps, NUMBER, 1e-3, 1e6), F(copy_us, NUMBER, 0, 1e6),
    F(cell_us, NUMBER, 0, 1e6),
    F(tp_world, NUMBER, 1, 64), F(tp_us, NUMBER, 0, 1e6), F(tp_gbps, NUMBER, 1e-3, 1e6),
};

static lm_status read_number(const struct field *f, const json_t *v, const char *path, double *out,
                             struct lm_err *err)
{
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= f->lo && x <= f->hi))
        return lm_err_set(err, LM_INVALID, "%s: %s must be a number from %g to %g", path, f->key,
                          f->lo, f->hi);
    *out = x;
    return LM_OK;
}

static lm_status read_curve(const struct field *f, const json_t *v, const char *path,
                            struct sim_curve *c, struct lm_err *err)
{
    if (!json_is_array(v)) {
        c->n = 1;
        c->x[0] = 0;
        return read_number(f, v, path, &c->y[0], err);
    }
    size_t n = json_array_size(v);
    if (n < 1 || n > SIM_TABLE_MAX)
        return lm_err_set(err, LM_INVALID, "%s: %s has %zu points; 1 to %d are allowed", path,
                          f->key, n, SIM_TABLE_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *p = json_array_get(v, i), *x = json_array_get(p, 0);
        if (json_array_size(p) != 2 || !json_is_number(x))
            return lm_err_set(err, LM_INVALID, "%s: %s[%zu] is not a pair of numbers", path,
                              f->key, i);
        c->x[i] = json_number_value(x);
        lm_status st = read_number(f, json_array_get(p, 1), path, &c->y[i], err);
        if (st != LM_OK)
            return st;
        if (i > 0 && !(c->x[i] > c->x[i - 1]))
            return lm_err_set(err, LM_INVALID, "%s: the points of %s don't rise", path, f->key);
    }
    c->n = (int)n;
    return LM_OK;
}

static lm_status read_dtype(const struct field *f, const json_t *v, const char *path,
                            enum kn_dtype *out, struct lm_err *err)
{
    const char *s = json_string_value(v);
    for (int t = KN_F32; s && t <= KN_BF16; t++) {
        if (!strcmp(s, kn_dtype_name((enum kn_dtype)t))) {
            *out = (enum kn_dtype)t;
            return LM_OK;
        }
    }
    return lm_err_set(err, LM_INVALID, "%s: %s must be \"float32\", \"float16\" or \"bfloat16\"",
                      path, f->key);
}

static lm_status read_field(const struct field *f, const json_t *v, const char *path,
                            struct sim_desc *d, struct lm_err *err)
{
    void *at = (char *)d + f->offset;
    if (!v)
        return lm_err_set(err, LM_INVALID, "%s: %s is missing", path, f->key);
    switch (f->type) {
    case NUMBER: return read_number(f, v, path, at, err);
    case CURVE: return read_curve(f, v, path, at, err);
    case DTYPE: return read_dtype(f, v, path, at, err);
    case FLAG: break;
    }
    if (!json_is_boolean(v))
        return lm_err_set(err, LM_INVALID, "%s: %s must be true or false", path, f->key);
    *(bool *)at = json_is_true(v);
    return LM_OK;
}

static bool is_known(const char *key)
{
    if (!strcmp(key, "name") || !strcmp(key, "about"))
        return true;
    for (size_t i = 0; i < LM_COUNT(fields); i++)
        if (!strcmp(key, fields[i].key))
            return true;
    return false;
}

static lm_status read_all(json_t *obj, const char *path, struct sim_desc *d, struct lm_err *err)
{
    const char *key, *name = json_string_value(json_object_get(obj, "name"));
    json_t *v;
    json_object_foreach(obj, key, v)
        if (!is_known(key))
            return lm_err_set(err, LM_INVALID, "%s: '%s' is not a property of a device", path, key);
    if (!name)
        return lm_err_set(err, LM_INVALID, "%s: name is missing", path);
    snprintf(d->name, sizeof d->name, "%s", name);
    for (size_t i = 0; i < LM_COUNT(fields); i++) {
        lm_status st = read_field(&fields[i], json_object_get(obj, fields[i].key), path, d, err);
        if (st != LM_OK)
            return st;
    }
    return LM_OK;
}

static lm_status finish(json_t *obj, const json_error_t *je, const char *path,
                        struct sim_desc *out, struct lm_err *err)
{
    lm_status st;
    memset(out, 0, sizeof *out);
    if (!obj)
        st = lm_err_set(err, LM_FORMAT, "%s: line %d: %s", path, je->line, je->text);
    else if (!json_is_object(obj))
        st = lm_err_set(err, LM_FORMAT, "%s: not a JSON object", path);
    else
        st = read_all(obj, path, out, err);
    json_decref(obj);
    return st;
}

lm_status sim_desc_parse(const char *text, size_t n, const char *path, struct sim_desc *out,
                         struct lm_err *err)
{
    json_error_t je;
    return finish(json_loadb(text, n, JSON_REJECT_DUPLICATES, &je), &je, path, out, err);
}

lm_status sim_desc_load(const char *path, struct sim_desc *out, struct lm_err *err)
{
    json_error_t je;
    if (!path)
        return lm_err_set(err, LM_INVALID, "backend 'sim' needs a device description, a "
                                           "JSON file");
    FILE *f = fopen(path, "rbe");
    if (!f)
        return lm_err_set(err, LM_NOT_FOUND, "device description '%s' can't be read", path);
    json_t *obj = json_loadf(f, JSON_REJECT_DUPLICATES, &je);
    fclose(f);
    return finish(obj, &je, path, out, err);
}

double sim_curve_at(const struct sim_curve *c, double x)
{
    if (x <= c->x[0])
        return c->y[0];
    for (int i = 1; i < c->n; i++)
        if (x < c->x[i])
            return c->y[i - 1] + (c->y[i] - c->y[i - 1]) * (x - c->x[i - 1]) /
                                     (c->x[i] - c->x[i - 1]);
    return c->y[c->n - 1];
}
