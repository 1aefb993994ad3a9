/* SPDX-License-Identifier: Apache-2.0 */
/*
 * emu_backend.cc - a kn_backend whose memory is the CPU backend's and whose operations are the CUDA
 * backend's own launchers and kernels, run by emu.cc. For tests only.
 */
#include "tests/emu/emu_backend.h"

#include "kernels/cuda/cuda_int.h"

#include <stdlib.h>
#include <string.h>

static struct kn_backend backend;
static int32_t fault_word;

extern "C" lm_status cuda_refuse(const char *, const char *)
{
    return LM_INVALID;
}

extern "C" lm_status cuda_check(struct cuda_device *, const char *, cudaError_t)
{
    return LM_OK;
}

static void emu_close(kn_device *dev)
{
    free(dev);
}

static void emu_props(kn_device *, struct kn_props *out)
{
    memset(out, 0, sizeof *out);
    out->act = out->kv = out->lora = KN_BF16;
    out->in_call = true;
}

static lm_status emu_stream_new(kn_device *dev, kn_stream **out, struct lm_err *)
{
    struct cuda_stream *st = (struct cuda_stream *)calloc(1, sizeof *st);
    st->base.be = &backend;
    st->dev = cuda_device_of(dev);
    st->scratch = calloc(1, CUDA_SCRATCH_BYTES);
    *out = &st->base;
    return LM_OK;
}

static void emu_stream_free(kn_stream *s)
{
    free(cuda_stream_of(s)->scratch);
    free(s);
}

static lm_status emu_stream_sync(kn_stream *, struct lm_err *)
{
    return fault_word ? LM_DEVICE : LM_OK;
}

extern "C" int emu_take_fault(void)
{
    int fault = fault_word;
    fault_word = 0;
    return fault;
}

extern "C" kn_device *emu_device_new(int sms, int cc)
{
    backend = kn_backend_cpu;
    backend.name = "emu";
    backend.close = emu_close;
    backend.props = emu_props;
    backend.stream_new = emu_stream_new;
    backend.stream_free = emu_stream_free;
    backend.stream_sync = emu_stream_sync;
    backend.kv_block_bytes = cuda_kv_block_bytes;
    backend.sample_workspace = cuda_sample_workspace;
    backend.sample = cuda_op_sample;
    backend.rmsnorm = cuda_op_rmsnorm;
    backend.silu_mul = cuda_op_silu_mul;
    backend.gather_rows = cuda_op_gather_rows;
    backend.feed = cuda_op_feed;
    backend.rope_kv = cuda_op_rope_kv;
    backend.attention = cuda_op_attention;
    backend.lora_shrink = cuda_op_lora_shrink;
    backend.lora_expand = cuda_op_lora_expand;
    struct cuda_device *d = (struct cuda_device *)calloc(1, sizeof *d);
    d->base.be = &backend;
    d->fault = d->fault_host = &fault_word;
    d->sms = sms;
    d->cc = cc;
    return &d->base;
}
