/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_util.c - see check.h. Timing needs the stream behind kn_stream, so this file sees the CUDA
 * backend's own header; the checks do not.
 */
#include "check.h"

#include "kernels/cuda/cuda_int.h"

void must(lm_status st, const char *what)
{
    if (st == LM_OK)
        return;
    printf("not ok - %s: %s\n", what, lm_status_text(st));
    fflush(stdout);
    exit(1);
}

bool check_that(struct gpu_check *c, bool ok, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    printf(ok ? "ok - " : "not ok - ");
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    fflush(stdout);
    c->passed += ok;
    c->failed += !ok;
    return ok;
}

void figure(struct gpu_check *c, const char *name, double value, const char *unit,
            const char *extra, ...)
{
    char more[512];
    va_list ap;
    va_start(ap, extra);
    vsnprintf(more, sizeof more, extra, ap);
    va_end(ap);
    printf("# %-44s %12.4g %-8s %s\n", name, value, unit, more);
    fflush(stdout);
    if (!c->json)
        return;
    fprintf(c->json, "{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"%s%s}\n", name, value,
            unit, more[0] ? ", " : "", more);
    fflush(c->json);
}

/* ---- numbers --------------------------------------------------------------------------- */

/* xorshift64*: checks must not depend on libc's rand. */
uint64_t rnd(void)
{
    static uint64_t x = 88172645463325252u;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 2685821657736338717u;
}

float rnd_float(void)
{
    return (float)((double)(rnd() >> 11) * 0x1p-52 - 1.0);
}

int rnd_int(int lo, int hi)
{
    return lo + (int)(rnd() % (uint64_t)(hi - lo + 1));
}

uint16_t bf16_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float bf16_value(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float round_bf16(float f)
{
    return bf16_value(bf16_bits(f));
}

/* ---- buffers --------------------------------------------------------------------------- */

static struct lm_err last_err;

static void *host_pinned(struct gpu_check *c, size_t bytes)
{
    void *p = NULL;
    must(kn_host_alloc(c->cuda, bytes, &p, &last_err), "pinned memory");
    return p;
}

void *dev_new(struct gpu_check *c, size_t bytes)
{
    void *p = NULL;
    must(kn_alloc(c->cuda, bytes, &p, &last_err), "device memory");
    must(kn_zero(c->gs, p, bytes), "zero");
    must(kn_stream_sync(c->gs, &last_err), "sync");
    return p;
}

void *dev_put(struct gpu_check *c, const void *src, size_t bytes)
{
    void *p = dev_new(c, bytes), *pinned = host_pinned(c, bytes);
    memcpy(pinned, src, bytes);
    must(kn_copy_in(c->gs, p, pinned, bytes), "copy_in");
    must(kn_stream_sync(c->gs, &last_err), "sync");
    kn_host_free(c->cuda, pinned);
    return p;
}

void dev_get(struct gpu_check *c, void *dst, const void *src, size_t bytes)
{
    void *pinned = host_pinned(c, bytes);
    must(kn_copy_out(c->gs, pinned, src, bytes), "copy_out");
    must(kn_stream_sync(c->gs, &last_err), last_err.msg[0] ? last_err.msg : "sync");
    memcpy(dst, pinned, bytes);
    kn_host_free(c->cuda, pinned);
}

void dev_free(struct gpu_check *c, void *p)
{
    kn_free(c->cuda, p);
}

struct pair pair_of(struct gpu_check *c, const float *v, size_t n)
{
    struct pair p = { .n = n };
    uint16_t *half = malloc((n + 1) * sizeof *half);
    p.cpu = malloc((n + 1) * sizeof *p.cpu);
    if (!half || !p.cpu)
        must(LM_NOMEM, "host memory");
    for (size_t i = 0; i < n; i++) {
        half[i] = bf16_bits(v[i]);
        p.cpu[i] = bf16_value(half[i]);
    }
    p.gpu = dev_put(c, half, n * sizeof *half);
    free(half);
    return p;
}

struct pair pair_new(struct gpu_check *c, size_t n)
{
    float *v = malloc((n + 1) * sizeof *v);
    if (!v)
        must(LM_NOMEM, "host memory");
    for (size_t i = 0; i < n; i++)
        v[i] = rnd_float();
    struct pair p = pair_of(c, v, n);
    free(v);
    return p;
}

void pair_free(struct gpu_check *c, struct pair *p)
{
    dev_free(c, p->gpu);
    free(p->cpu);
}

float *pair_get(struct gpu_check *c, const struct pair *p)
{
    uint16_t *half = malloc((p->n + 1) * sizeof *half);
    float *v = malloc((p->n + 1) * sizeof *v);
    if (!half || !v)
        must(LM_NOMEM, "host memory");
    dev_get(c, half, p->gpu, p->n * sizeof *half);
    for (size_t i = 0; i < p->n; i++)
        v[i] = bf16_value(half[i]);
    free(half);
    return v;
}

void mats_new(struct gpu_check *c, int rows, int cols, float scale, kn_mat **gpu, kn_mat **cpu)
{
    uint64_t seed = rnd();
    must(kn_mat_new(c->cuda, KN_BF16, rows, cols, gpu, &last_err), "mat_new");
    must(kn_mat_new(c->cpu, KN_BF16, rows, cols, cpu, &last_err), "mat_new");
    must(kn_mat_fill(*gpu, seed, scale, &last_err), "mat_fill");
    must(kn_mat_fill(*cpu, seed, scale, &last_err), "mat_fill");
}

void fill_random(struct gpu_check *c, void *x, int rows, int cols)
{
    kn_mat *m = NULL;
    int32_t *ids = malloc((size_t)rows * sizeof *ids);
    for (int i = 0; i < rows; i++)
        ids[i] = i;
    int32_t *dids = dev_put(c, ids, (size_t)rows * sizeof *ids);
    must(kn_mat_new(c->cuda, KN_BF16, rows, cols, &m, &last_err), "mat_new");
    must(kn_mat_fill(m, rnd(), 1, &last_err), "mat_fill");
    struct kn_embed a = { x, m, dids, rows, cols };
    must(kn_op_embed(c->gs, &a), "embed");
    must(kn_stream_sync(c->gs, &last_err), "sync");
    kn_mat_free(m);
    dev_free(c, dids);
    free(ids);
}

double excess(const float *got, const float *want, const float *mag, size_t n, double out_ulp,
              double sum_tol)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double limit = out_ulp * fabs(want[i]) + sum_tol * (mag ? mag[i] : 1.0) + 1e-30;
        double off = fabs((double)got[i] - (double)want[i]) / limit;
        if (isnan(got[i]) != isnan(want[i]))
            return INFINITY;
        if (!isnan(got[i]))
            worst = fmax(worst, off);
    }
    return worst;
}

/* ---- time ------------------------------------------------------------------------------ */

static void cuda_must(cudaError_t e, const char *what)
{
    if (e != cudaSuccess)
        printf("# %s: %s\n", what, cudaGetErrorString(e));
    must(e == cudaSuccess ? LM_OK : LM_DEVICE, what);
}

static cudaGraphExec_t capture(struct gpu_check *c,
                               lm_status (*op)(struct gpu_check *c, void *ctx, int i), void *ctx,
                               int n)
{
    cudaStream_t s = cuda_stream_of(c->gs)->s;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    must(op(c, ctx, 0), "a timed operation");           /* plans and modules are ready after this */
    must(kn_stream_sync(c->gs, &last_err), "sync");
    cuda_must(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < n; i++)
        must(op(c, ctx, i), "a captured operation");
    cuda_must(cudaStreamEndCapture(s, &graph), "capture's end");
    cuda_must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaGraphDestroy(graph);
    return exec;
}

double time_op(struct gpu_check *c, lm_status (*op)(struct gpu_check *c, void *ctx, int i),
               void *ctx, int n)
{
    cudaStream_t s = cuda_stream_of(c->gs)->s;
    cudaGraphExec_t exec = capture(c, op, ctx, n);
    cudaEvent_t from, to;
    float best = INFINITY;
    cuda_must(cudaEventCreate(&from), "event");
    cuda_must(cudaEventCreate(&to), "event");
    for (int round = 0; round < 4; round++) {
        float ms = 0;
        cuda_must(cudaEventRecord(from, s), "event");
        cuda_must(cudaGraphLaunch(exec, s), "launch");
        cuda_must(cudaEventRecord(to, s), "event");
        cuda_must(cudaEventSynchronize(to), "wait");
        cuda_must(cudaEventElapsedTime(&ms, from, to), "time");
        best = round > 0 && ms < best ? ms : best;      /* the first round warms up */
    }
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    cudaGraphExecDestroy(exec);
    return (double)best * 1000 / n;
}
