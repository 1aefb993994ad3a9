/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cost.c - what an operation costs, from its shape and the device's description. Pure.
 *
 * A matrix product takes t = (tm^p + tc^p)^(1/p), where tm is the weight over the bandwidth that
 * weights of its size get, tc the multiplications over the rate that M rows get, and p (gemm_norm)
 * says how well the two overlap: infinity is a roofline, 1 no overlap at all. With p = 3 it meets
 * cuBLAS on an H200 within 12 % from M = 1 to 4096 on a 7B model's shapes (docs/simulator.md).
 *
 * Attention reads the keys and values of decoding sequences at a share of the bandwidth, and those
 * of a chunk of queries once for each tile of SIM_QUERY_TILE of them; chunks also multiply. LoRA
 * reads each segment's weights once, or (BGMV) once for each token. The longest of an operation's
 * demands is its time; demands of one operation overlap.
 *
 * In a group of tp_world devices each holds and computes its share; what is not split (norms,
 * embeddings) each does in full.
 */
#include "kernels/sim/sim_int.h"

#include <math.h>

static int64_t ns(double seconds)
{
    return llround(seconds * 1e9);
}

static double max3(double a, double b, double c)
{
    return fmax(a, fmax(b, c));
}

int64_t sim_stream_ns(const struct sim_desc *d, double bytes)
{
    return ns(bytes / (d->bandwidth_gbps * d->element_share * 1e9));
}

int64_t sim_gemm_ns(const struct sim_desc *d, double m, double n, double k, double weight_bytes)
{
    double bytes = weight_bytes / d->tp_world;
    double tm = bytes / (sim_curve_at(&d->gemm_gbps, bytes / 1e6) * 1e9);
    double tc = 2 * m * n * k / d->tp_world / (sim_curve_at(&d->gemm_tflops, m) * 1e12);
    return ns(pow(pow(tm, d->gemm_norm) + pow(tc, d->gemm_norm), 1 / d->gemm_norm));
}

double sim_kv_token_bytes(const struct sim_desc *d, enum kn_kv kv, int kv_heads, int head_dim)
{
    enum kn_dtype t = kv == KN_KV_E4M3 ? KN_E4M3 : d->kv;
    return 2.0 * kv_heads * head_dim * (double)kn_dtype_size(t);
}

int64_t sim_attention_ns(const struct sim_desc *d, const struct kn_attention *a,
                         const struct sim_attention_load *l)
{
    double per_token = sim_kv_token_bytes(d, a->pool.kv, a->kv_heads, a->head_dim) / d->tp_world;
    double read = (l->decode_kv + l->chunk_kv) * per_token;
    double flops = 4 * l->pairs * a->q_heads * a->head_dim / d->tp_world;
    return ns(fmax(read / (d->bandwidth_gbps * d->decode_share * 1e9),
                   flops / (d->prefill_tflops * 1e12)));
}

int64_t sim_lora_ns(const struct sim_desc *d, const struct sim_lora_load *l, double share)
{
    double e = (double)kn_dtype_size(d->lora), act = (double)kn_dtype_size(d->act);
    double read = (l->rank_sum * e / d->tp_world + l->rows * act) /
                  (d->bandwidth_gbps * share * 1e9);
    double compute = 2 * l->rank_tok / d->tp_world / (d->lora_tflops * 1e12);
    double again = d->lora_token_gbps > 0
                       ? l->rank_tok * e / d->tp_world / (d->lora_token_gbps * 1e9) : 0;
    return ns(d->lora_us * 1e-6 + max3(read, compute, again));
}

int64_t sim_reduce_ns(const struct sim_desc *d, double bytes)
{
    if (d->tp_world <= 1)
        return 0;
    double moved = 2 * (d->tp_world - 1) / d->tp_world * bytes;         /* a ring */
    return ns(d->tp_us * 1e-6 + moved / (d->tp_gbps * 1e9));
}

int64_t sim_copy_ns(const struct sim_desc *d, bool in, double bytes, int cells)
{
    double rate = (in ? d->in_gbps : d->out_gbps) * 1e9;
    return ns((d->copy_us + cells * d->cell_us) * 1e-6 + bytes / rate);
}
