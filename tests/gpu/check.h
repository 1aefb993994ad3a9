/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.h - what the GPU checks share: a CUDA device beside its CPU twin, buffers that live on
 * both, comparison, timing, and figures.
 *
 * A check gives the same numbers, rounded to bf16, to an operation on both devices; the CPU
 * computes in float32. Results may differ by what bf16 costs and no more:
 *     |gpu - cpu| <= OUT_ULP * |cpu| + sum_tol * magnitude
 * where OUT_ULP is the rounding of the result itself and `magnitude` is the sum of the magnitudes
 * of the terms that went into it.
 *
 * Output is TAP, one line a check; figures go to stdout as a table row and to the results file as
 * one JSON object a line. Each part prints what it has even when a later one dies.
 */
#ifndef LORAMILL_TESTS_GPU_CHECK_H
#define LORAMILL_TESTS_GPU_CHECK_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

/* Unit roundoff of bf16 (8 significant bits) and a hair: the rounding of a result. */
#define OUT_ULP (0x1p-8 * 1.01)
/* Relative error of a float32 sum of up to 2^14 terms, whatever the order. */
#define F32_SUM 0x1p-20

struct gpu_check {
    kn_device *cuda, *cpu;
    kn_stream *gs, *cs;
    FILE *json;                 /* figures, or NULL */
    int passed, failed;
    double gbps, tflops;        /* this card's, measured by bench_ceilings(); 0 before */
};

/* Prints "ok - what" or "not ok - what" and counts; returns ok. */
bool check_that(struct gpu_check *c, bool ok, const char *fmt, ...) LM_PRINTF(3, 4);

/* Dies with a line when st is not LM_OK: nothing that follows would mean anything. */
void must(lm_status st, const char *what);

/* ---- numbers --------------------------------------------------------------------------- */

uint64_t rnd(void);
float rnd_float(void);                  /* [-1, 1) */
int rnd_int(int lo, int hi);            /* both included */
float round_bf16(float f);
uint16_t bf16_bits(float f);
float bf16_value(uint16_t h);

/* ---- buffers --------------------------------------------------------------------------- */

/* n activations on both devices, equal bit for bit after rounding to bf16. */
struct pair {
    void *gpu;                  /* bf16 */
    float *cpu;
    size_t n;
};

struct pair pair_new(struct gpu_check *c, size_t n);            /* random in [-1, 1) */
struct pair pair_of(struct gpu_check *c, const float *v, size_t n);     /* rounds v */
void pair_free(struct gpu_check *c, struct pair *p);
float *pair_get(struct gpu_check *c, const struct pair *p);     /* the GPU's, widened; free() */

void *dev_new(struct gpu_check *c, size_t bytes);       /* on the GPU, zeroed */
void *dev_put(struct gpu_check *c, const void *src, size_t bytes);
void dev_get(struct gpu_check *c, void *dst, const void *src, size_t bytes);
void dev_free(struct gpu_check *c, void *p);

/* The same weight on both, random in [-scale, scale). */
void mats_new(struct gpu_check *c, int rows, int cols, float scale, kn_mat **gpu, kn_mat **cpu);

/* Random activations [rows, cols] on the device: zeros would let it run cooler and faster. */
void fill_random(struct gpu_check *c, void *x, int rows, int cols);

/* Largest excess: max over i of |got - want| / (OUT_ULP |want| + sum_tol * mag[i]); <= 1 is fine.
 * `mag` NULL: 1 everywhere. NaN anywhere gives infinity. */
double excess(const float *got, const float *want, const float *mag, size_t n, double out_ulp,
              double sum_tol);

/* ---- time ------------------------------------------------------------------------------ */

/* Microseconds a call: n calls are captured into one CUDA graph on c->gs, which runs several
 * times; the best counts. `op` gets ctx and 0 .. n-1, to walk through buffers larger than L2. */
double time_op(struct gpu_check *c, lm_status (*op)(struct gpu_check *c, void *ctx, int i),
               void *ctx, int n);

/* One figure: a line for people and {"name": .., "value": .., "unit": .., <extra>} for machines;
 * `extra` is JSON members as text, "" for none. */
void figure(struct gpu_check *c, const char *name, double value, const char *unit,
            const char *extra, ...) LM_PRINTF(5, 6);

/* ---- parts, one file each -------------------------------------------------------------- */

void check_device(struct gpu_check *c);         /* memory, copies, cells, events, matrices */
void check_rows(struct gpu_check *c);
void check_gemm(struct gpu_check *c);
void check_sample(struct gpu_check *c);
void check_attention(struct gpu_check *c);      /* rope_kv too */
void check_prefill(struct gpu_check *c);        /* a part of it */
void check_lora(struct gpu_check *c);           /* merge too */
void check_golden(struct gpu_check *c);         /* the whole engine, on the small models */
void check_graph(struct gpu_check *c);          /* the same, recorded against single operations */
void check_company(struct gpu_check *c);        /* the same request beside others */

void bench_ceilings(struct gpu_check *c);
void bench_rows(struct gpu_check *c);
void bench_gemm(struct gpu_check *c);
void bench_gemm_mixed(struct gpu_check *c);     /* float16 and E4M3 */
void bench_sample(struct gpu_check *c);
void bench_decodes(struct gpu_check *c);        /* a part of bench_attention() */
void bench_prefills(struct gpu_check *c);       /* a part of bench_attention() */
void bench_attention(struct gpu_check *c);
void bench_lora(struct gpu_check *c);

/* ---- files ----------------------------------------------------------------------------- */

/* gpu-check files ...: an exit status. */
int files_main(int argc, char **argv);

#endif
