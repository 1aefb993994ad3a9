/* SPDX-License-Identifier: Apache-2.0 */
/*
 * twin.h - what the checks of a device against its CPU twin share.
 *
 * A check builds the same inputs on two sides, runs the same operations, and compares. Inputs are
 * rounded to bf16 first, so both sides start from the same numbers and the tolerance covers the
 * arithmetic alone. The same checks run against a real device (make gpu-check) and against the
 * emulator (tests/unit), which is why they know nothing but kernels.h.
 */
#ifndef LORAMILL_TEST_TWIN_H
#define LORAMILL_TEST_TWIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct side {
    kn_device *dev;
    kn_stream *s;
    struct kn_props props;
    void **owned;               /* device memory to give back in side_reset() */
    int n_owned, cap_owned;
};

struct twin {
    struct side gpu, cpu;
    bool slow;                  /* emulated: take small cases only */
    int own_rows;               /* emulated: it multiplies by bf16 with so many rows at most */
    char what[160];             /* the case at work, for messages */
    int n_cases, n_failed, n_printed;
    bool case_failed;
};

bool twin_open(struct twin *c, kn_device *gpu, kn_device *cpu);
void twin_close(struct twin *c);

/* A case begins: the one before ends, its memory goes back. */
void twin_case(struct twin *c, const char *fmt, ...) LM_PRINTF(2, 3);
/* Ends the last case; prints "ok - NAME: n cases" or "not ok - ...". True if all passed. */
bool twin_end(struct twin *c, const char *name);

void twin_fail(struct twin *c, const char *fmt, ...) LM_PRINTF(2, 3);
bool twin_status(struct twin *c, lm_status got, lm_status want, const char *op);
void twin_near(struct twin *c, const char *what, int64_t i, int64_t j, float got, float want,
                double tol);

/* Device memory, filled with bytes of 0xff (NaN in every float format). */
void *side_new(struct twin *c, struct side *s, size_t bytes);
void *side_put(struct twin *c, struct side *s, const void *host, size_t bytes);
void *side_put_act(struct twin *c, struct side *s, const float *x, size_t n);
void side_get(struct twin *c, struct side *s, const void *p, void *host, size_t bytes);
void side_get_act(struct twin *c, struct side *s, const void *p, float *out, size_t n);
void side_reset(struct side *s);

/* A deterministic generator. */
uint64_t tw_rnd(void);
int tw_int(int lo, int hi);            /* both included */
float tw_value(void);                   /* [-1, 1), representable in bf16 */
float *tw_floats(size_t n);            /* of those; free() */
float tw_round(float x);                 /* rounded to it */
uint16_t tw_bits(float x);

bool twin_attention(struct twin *c);
bool twin_prefill(struct twin *c);      /* what of it has several tiles */
bool twin_lora(struct twin *c);
bool twin_attention_few(struct twin *c);    /* cases for tools that make a device slow */
bool twin_lora_few(struct twin *c);
bool twin_sample(struct twin *c);
bool twin_rows(struct twin *c);
bool twin_gemm_fp8(struct twin *c);
bool twin_company(struct twin *c);      /* products */
bool twin_gate_up(struct twin *c);
bool twin_gate_up_boxes(struct twin *c);
bool twin_gemm_x_e4m3(struct twin *c);
bool twin_gemm_f16(struct twin *c);        /* embed too */

#ifdef __cplusplus
}
#endif
#endif
