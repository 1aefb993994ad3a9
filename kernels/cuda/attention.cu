/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attention.cu - rotary embedding with the write of K and V, and paged attention.
 */
#include "kernels/cuda/cuda_int.h"

extern "C" size_t cuda_kv_block_bytes(kn_device *dev, int block_tokens, int kv_heads, int head_dim)
{
    (void)dev;
    return (size_t)2 * (size_t)block_tokens * (size_t)kv_heads * (size_t)head_dim * sizeof(bf16);
}

extern "C" lm_status cuda_op_rope_kv(kn_stream *s, const struct kn_rope_kv *a)
{
    (void)s, (void)a;
    return LM_UNSUPPORTED;
}

extern "C" lm_status cuda_op_attention(kn_stream *s, const struct kn_attention *a)
{
    (void)s, (void)a;
    return LM_UNSUPPORTED;
}
