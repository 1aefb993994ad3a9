/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_config_rope.c - rotary frequencies as Hugging Face transformers computes them.
 *
 * transformers 4 writes "rope_theta" and "rope_scaling" (null, or an object whose kind is
 * "rope_type" or, older, "type"); transformers 5 writes one "rope_parameters" object that holds
 * the theta too. Where both stand, rope_scaling wins, and a theta inside the object wins over the
 * one outside: that is transformers 5's own order.
 *
 * The arithmetic is float32 where torch's is, step by step, because at position 100,000 one part
 * in 10^7 of a frequency already is 0.01 of a radian. Sources:
 *   default   Su et al., arXiv 2104.09864
 *   linear    Chen et al., arXiv 2306.15595
 *   dynamic   "NTK-aware" scaling that grows with the sequence; the kernel computes it per token
 *             (struct kn_rope_kv), here are only the unscaled frequencies
 *   yarn      Peng et al., arXiv 2309.00071
 *   llama3    the piecewise scaling of Llama 3.1
 */
#include <math.h>
#include <string.h>

#include "engine/model_config_internal.h"

#define THETA_DEFAULT 10000.0
#define FACTOR_MAX 1e6

struct rope_spec {
    double theta, factor;
    int original_max;
    double attention_factor, mscale, mscale_all_dim, beta_fast, beta_slow;
    double low_freq, high_freq;
    bool has_factor, has_attention, truncate;
};

static const char *const rope_keys[] = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "finetuned",
};

static lm_status check_rope_keys(const struct ju *j)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)j->obj, key, v) {
        if (json_is_null(v) || ju_name_in(key, rope_keys, LM_COUNT(rope_keys)))
            continue;
        if (json_is_object(v))
            return lm_err_set(j->err, LM_UNSUPPORTED, "%s: %s%.64s: RoPE parameters for each kind"
                              " of layer are not supported", j->file, j->path, key);
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: %s%.64s is not supported", j->file, j->path,
                          key);
    }
    return LM_OK;
}

static lm_status refuse_partial(const struct ju *j)
{
    double partial = 1;
    lm_status s = ju_num(j, "partial_rotary_factor", 0, 1, &partial);
    if (!s && partial != 1)
        s = lm_err_set(j->err, LM_UNSUPPORTED, "%s: %spartial_rotary_factor %g is not supported"
                       " (only 1)", j->file, j->path, partial);
    return s;
}

static lm_status rope_kind(const struct ju *j, enum rope_type *kind)
{
    static const struct {
        const char *name;
        enum rope_type kind;
    } kinds[] = {
        { "default", ROPE_DEFAULT }, { "linear", ROPE_LINEAR }, { "dynamic", ROPE_DYNAMIC },
        { "llama3", ROPE_LLAMA3 }, { "yarn", ROPE_YARN },
    };
    const char *name = NULL;
    lm_status s = ju_str(j, "rope_type", &name);
    if (!s && !name)
        s = ju_str(j, "type", &name);
    if (s)
        return s;
    *kind = ROPE_DEFAULT;
    if (!name)
        return LM_OK;
    for (size_t i = 0; i < LM_COUNT(kinds); i++) {
        if (strcmp(name, kinds[i].name) == 0) {
            *kind = kinds[i].kind;
            return LM_OK;
        }
    }
    return lm_err_set(j->err, LM_UNSUPPORTED, "%s: %srope_type \"%.32s\" is not supported (default,"
                      " linear, dynamic, llama3 and yarn are)", j->file, j->path, name);
}

static lm_status read_numbers(const struct ju *j, struct rope_spec *r)
{
    lm_status s;
    r->has_factor = ju_has(j, "factor");
    r->has_attention = ju_has(j, "attention_factor");
    if ((s = ju_num(j, "rope_theta", 1, 1e12, &r->theta)) ||
        (s = ju_num(j, "factor", 1e-3, FACTOR_MAX, &r->factor)) ||
        (s = ju_int32(j, "original_max_position_embeddings", 1, 1 << 24, &r->original_max)) ||
        (s = ju_num(j, "attention_factor", 0, 1e3, &r->attention_factor)) ||
        (s = ju_num(j, "mscale", 0, 1e3, &r->mscale)) ||
        (s = ju_num(j, "mscale_all_dim", 0, 1e3, &r->mscale_all_dim)) ||
        (s = ju_num(j, "beta_fast", 0, FACTOR_MAX, &r->beta_fast)) ||
        (s = ju_num(j, "beta_slow", 0, FACTOR_MAX, &r->beta_slow)) ||
        (s = ju_num(j, "low_freq_factor", 1e-6, FACTOR_MAX, &r->low_freq)) ||
        (s = ju_num(j, "high_freq_factor", 1e-6, FACTOR_MAX, &r->high_freq)) ||
        (s = ju_bool(j, "truncate", &r->truncate)))
        return s;
    return refuse_partial(j);
}

static lm_status check_complete(const struct ju *j, enum rope_type kind, const struct rope_spec *r)
{
    if (kind != ROPE_DEFAULT && kind != ROPE_YARN && !r->has_factor)
        return ju_missing(j, "factor");
    if (kind == ROPE_LLAMA3 && (!ju_has(j, "low_freq_factor") || !ju_has(j, "high_freq_factor")))
        return ju_missing(j, ju_has(j, "low_freq_factor") ? "high_freq_factor"
                                                          : "low_freq_factor");
    if (kind == ROPE_LLAMA3 && r->high_freq <= r->low_freq)
        return lm_err_set(j->err, LM_INVALID, "%s: %shigh_freq_factor %g must be above"
                          " low_freq_factor %g", j->file, j->path, r->high_freq, r->low_freq);
    if (kind == ROPE_YARN && r->theta <= 1)
        return lm_err_set(j->err, LM_INVALID, "%s: rope_theta %g must be above 1 for yarn", j->file,
                          r->theta);
    return LM_OK;
}

/* ---- frequencies ----------------------------------------------------------------------- */

static void freq_default(float *f, int dim, double theta)
{
    for (int i = 0; i < dim / 2; i++)
        f[i] = 1.0f / powf((float)theta, (float)(2 * i) / (float)dim);
}

static void scale_linear(float *f, int dim, double factor)
{
    for (int i = 0; i < dim / 2; i++)
        f[i] /= (float)factor;
}

/* Long wavelengths are divided by the factor, short ones kept, those between blended. A number over
 * a tensor is reciprocal times number in torch, hence the shape of two lines. */
static void scale_llama3(float *f, int dim, const struct rope_spec *r)
{
    float factor = (float)r->factor, old = (float)r->original_max;
    float low_wave = (float)(r->original_max / r->low_freq);
    float high_wave = (float)(r->original_max / r->high_freq);
    float low = (float)r->low_freq, span = (float)(r->high_freq - r->low_freq);
    for (int i = 0; i < dim / 2; i++) {
        float wave = 1.0f / f[i] * (float)(2 * M_PI);
        if (wave > low_wave) {
            f[i] /= factor;
        } else if (wave >= high_wave) {
            float smooth = (1.0f / wave * old - low) / span;
            f[i] = (1.0f - smooth) * f[i] / factor + smooth * f[i];
        }
    }
}

/* The dimension at which a frequency turns `rotations` times over the original context. */
static double yarn_dim(double rotations, int dim, const struct rope_spec *r)
{
    return dim * log(r->original_max / (rotations * 2 * M_PI)) / (2 * log(r->theta));
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

static float yarn_attention(const struct rope_spec *r)
{
    if (r->has_attention)
        return (float)r->attention_factor;
    if (r->mscale != 0 && r->mscale_all_dim != 0)
        return (float)(yarn_mscale(r->factor, r->mscale) /
                       yarn_mscale(r->factor, r->mscale_all_dim));
    return (float)yarn_mscale(r->factor, 1);
}

static void scale_yarn(float *f, int dim, const struct rope_spec *r)
{
    double low = yarn_dim(r->beta_fast, dim, r), high = yarn_dim(r->beta_slow, dim, r);
    if (r->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, dim - 1);
    if (low == high)
        high += 0.001;
    for (int i = 0; i < dim / 2; i++) {
        float ramp = ((float)i - (float)low) / (float)(high - low);
        ramp = fminf(fmaxf(ramp, 0.0f), 1.0f);
        float pos = powf((float)r->theta, (float)(2 * i) / (float)dim);
        float extra = 1.0f - ramp;
        f[i] = 1.0f / ((float)r->factor * pos) * (1.0f - extra) + 1.0f / pos * extra;
    }
}

static lm_status compute(const struct ju *j, const struct rope_spec *r, struct model_config *c)
{
    c->rope_theta = (float)r->theta;
    c->attention_factor = 1;
    c->inv_freq = lm_calloc((size_t)c->head_dim / 2, sizeof *c->inv_freq);
    if (!c->inv_freq)
        return lm_err_set(j->err, LM_NOMEM, "%s: no memory for frequencies", j->file);
    freq_default(c->inv_freq, c->head_dim, r->theta);
    switch (c->rope) {
    case ROPE_DEFAULT:
        break;
    case ROPE_LINEAR:
        scale_linear(c->inv_freq, c->head_dim, r->factor);
        break;
    case ROPE_DYNAMIC:
        c->dyn_factor = (float)r->factor;
        c->dyn_max = c->max_position;
        break;
    case ROPE_LLAMA3:
        scale_llama3(c->inv_freq, c->head_dim, r);
        break;
    case ROPE_YARN:
        scale_yarn(c->inv_freq, c->head_dim, r);
        c->attention_factor = yarn_attention(r);
        break;
    }
    for (int i = 0; i < c->head_dim / 2; i++)
        if (!isfinite(c->inv_freq[i]))
            return lm_err_set(j->err, LM_INVALID, "%s: %sthe RoPE parameters give a frequency that"
                              " is not finite", j->file, j->path);
    return LM_OK;
}

/* The object that scaling parameters stand in; an empty cursor when there is none. */
static lm_status rope_object(const struct ju *j, struct ju *sub)
{
    const char *key = ju_has(j, "rope_scaling") &&
                      !ju_is_off(json_object_get(j->obj, "rope_scaling"))
                      ? "rope_scaling" : "rope_parameters";
    *sub = *j;
    sub->obj = NULL;
    if (!ju_has(j, key))
        return LM_OK;
    sub->obj = json_object_get(j->obj, key);
    sub->path = strcmp(key, "rope_scaling") ? "rope_parameters." : "rope_scaling.";
    return json_is_object(sub->obj) ? LM_OK : ju_bad_type(j, key, "an object");
}

lm_status model_config_rope(const struct ju *j, struct model_config *c)
{
    struct rope_spec r = { .theta = THETA_DEFAULT, .factor = 1, .original_max = c->max_position,
                           .truncate = true };
    struct ju sub;
    lm_status s;
    if ((s = refuse_partial(j)) || (s = ju_num(j, "rope_theta", 1, 1e12, &r.theta)) ||
        (s = rope_object(j, &sub)))
        return s;
    c->rope = ROPE_DEFAULT;
    if (sub.obj) {
        if ((s = check_rope_keys(&sub)) || (s = rope_kind(&sub, &c->rope)) ||
            (s = read_numbers(&sub, &r)) || (s = check_complete(&sub, c->rope, &r)))
            return s;
    }
    /* Outside the object this one wins over the one inside, for every kind that reads it. */
    s = ju_int32(j, "original_max_position_embeddings", 1, 1 << 24, &r.original_max);
    if (s)
        return s;
    if (!r.has_factor)
        r.factor = (double)c->max_position / r.original_max;
    if (r.beta_fast == 0)
        r.beta_fast = 32;
    if (r.beta_slow == 0)
        r.beta_slow = 1;
    return compute(&sub, &r, c);
}
