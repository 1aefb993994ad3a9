/* SPDX-License-Identifier: Apache-2.0 */
/*
 * twin.c - two sides, their memory, comparison and reporting (see twin.h).
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PRINTED 20

uint64_t tw_rnd(void)
{
    static uint64_t x = 88172645463325252u;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 2685821657736338717u;
}

int tw_int(int lo, int hi)
{
    return lo + (int)(tw_rnd() % (uint64_t)(hi - lo + 1));
}

uint16_t tw_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float tw_round(float x)
{
    uint32_t u = (uint32_t)tw_bits(x) << 16;
    memcpy(&x, &u, sizeof x);
    return x;
}

float tw_value(void)
{
    return tw_round((float)((double)(tw_rnd() >> 11) * 0x1p-52 - 1.0));
}

float *tw_floats(size_t n)
{
    float *p = malloc((n + 1) * sizeof *p);
    for (size_t i = 0; i < n; i++)
        p[i] = tw_value();
    return p;
}

/* ---- cases ----------------------------------------------------------------------------- */

static bool side_open(struct side *s, kn_device *dev)
{
    struct lm_err err = { 0 };
    *s = (struct side){ .dev = dev };
    kn_props(dev, &s->props);
    if (kn_stream_new(dev, &s->s, &err) == LM_OK)
        return true;
    fprintf(stderr, "# %s\n", err.msg);
    return false;
}

bool twin_open(struct twin *c, kn_device *gpu, kn_device *cpu)
{
    *c = (struct twin){ 0 };
    return side_open(&c->gpu, gpu) && side_open(&c->cpu, cpu);
}

void twin_close(struct twin *c)
{
    struct side *sides[] = { &c->gpu, &c->cpu };
    for (int i = 0; i < 2; i++) {
        side_reset(sides[i]);
        kn_stream_free(sides[i]->s);
        free(sides[i]->owned);
    }
}

static void end_case(struct twin *c)
{
    side_reset(&c->gpu);
    side_reset(&c->cpu);
    c->n_failed += c->case_failed;
    c->case_failed = false;
}

void twin_case(struct twin *c, const char *fmt, ...)
{
    va_list ap;
    end_case(c);
    c->n_cases++;
    va_start(ap, fmt);
    vsnprintf(c->what, sizeof c->what, fmt, ap);
    va_end(ap);
}

bool twin_end(struct twin *c, const char *name)
{
    end_case(c);
    bool good = c->n_failed == 0 && c->n_cases > 0;
    printf("%s - %s: %d of %d cases\n", good ? "ok" : "not ok", name, c->n_cases - c->n_failed,
           c->n_cases);
    fflush(stdout);
    c->n_cases = c->n_failed = 0;
    return good;
}

void twin_fail(struct twin *c, const char *fmt, ...)
{
    c->case_failed = true;
    if (c->n_printed++ >= MAX_PRINTED)
        return;
    va_list ap;
    printf("# %s: ", c->what);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
}

bool twin_status(struct twin *c, lm_status got, lm_status want, const char *op)
{
    if (got != want)
        twin_fail(c, "%s: %s, expected %s", op, lm_status_text(got), lm_status_text(want));
    return got == want;
}

void twin_near(struct twin *c, const char *what, int64_t i, int64_t j, float got, float want,
                double tol)
{
    if (!(fabs((double)got - (double)want) <= tol))
        twin_fail(c, "%s [%lld, %lld]: %.7g, expected %.7g within %.3g", what, (long long)i,
                   (long long)j, (double)got, (double)want, tol);
}

/* ---- memory ---------------------------------------------------------------------------- */

void side_reset(struct side *s)
{
    for (int i = 0; i < s->n_owned; i++)
        kn_free(s->dev, s->owned[i]);
    s->n_owned = 0;
}

static void *own(struct twin *c, struct side *s, size_t bytes)
{
    struct lm_err err = { 0 };
    void *p = NULL;
    if (kn_alloc(s->dev, bytes + 1, &p, &err) != LM_OK) {
        twin_fail(c, "%s", err.msg);
        exit(1);
    }
    if (s->n_owned == s->cap_owned) {
        s->cap_owned = s->cap_owned * 2 + 16;
        s->owned = realloc(s->owned, (size_t)s->cap_owned * sizeof *s->owned);
    }
    return s->owned[s->n_owned++] = p;
}

void *side_put(struct twin *c, struct side *s, const void *host, size_t bytes)
{
    struct lm_err err = { 0 };
    void *p = own(c, s, bytes), *pinned = NULL;
    if (bytes == 0)
        return p;
    if (kn_host_alloc(s->dev, bytes, &pinned, &err) != LM_OK)
        twin_fail(c, "%s", err.msg);
    if (host)
        memcpy(pinned, host, bytes);
    else
        memset(pinned, 0xff, bytes);
    kn_copy_in(s->s, p, pinned, bytes);
    twin_status(c, kn_stream_sync(s->s, &err), LM_OK, "copy in");
    kn_host_free(s->dev, pinned);
    return p;
}

void *side_new(struct twin *c, struct side *s, size_t bytes)
{
    return side_put(c, s, NULL, bytes);
}

void side_get(struct twin *c, struct side *s, const void *p, void *host, size_t bytes)
{
    struct lm_err err = { 0 };
    void *pinned = NULL;
    if (bytes == 0)
        return;
    if (kn_host_alloc(s->dev, bytes, &pinned, &err) != LM_OK)
        twin_fail(c, "%s", err.msg);
    kn_copy_out(s->s, pinned, p, bytes);
    if (!twin_status(c, kn_stream_sync(s->s, &err), LM_OK, "copy out")) {
        printf("# %s\n", err.msg);
        exit(1);                /* nothing on this device means anything now */
    }
    memcpy(host, pinned, bytes);
    kn_host_free(s->dev, pinned);
}

void *side_put_act(struct twin *c, struct side *s, const float *x, size_t n)
{
    if (s->props.act == KN_F32)
        return side_put(c, s, x, n * sizeof *x);
    uint16_t *half = malloc(n * sizeof *half + 1);
    for (size_t i = 0; i < n; i++)
        half[i] = tw_bits(x[i]);
    void *p = side_put(c, s, half, n * sizeof *half);
    free(half);
    return p;
}

void side_get_act(struct twin *c, struct side *s, const void *p, float *out, size_t n)
{
    if (s->props.act == KN_F32) {
        side_get(c, s, p, out, n * sizeof *out);
        return;
    }
    uint16_t *half = malloc(n * sizeof *half + 1);
    side_get(c, s, p, half, n * sizeof *half);
    for (size_t i = 0; i < n; i++) {
        uint32_t u = (uint32_t)half[i] << 16;
        memcpy(&out[i], &u, sizeof u);
    }
    free(half);
}
