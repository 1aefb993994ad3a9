/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora.cu - shrink, expand and merge, straight from the pool's cells.
 */
#include "kernels/cuda/cuda_int.h"

extern "C" lm_status cuda_op_lora_shrink(kn_stream *s, const struct kn_lora *a)
{
    (void)s, (void)a;
    return LM_UNSUPPORTED;
}

extern "C" lm_status cuda_op_lora_expand(kn_stream *s, const struct kn_lora *a)
{
    (void)s, (void)a;
    return LM_UNSUPPORTED;
}

extern "C" lm_status cuda_op_lora_merge(kn_stream *s, const struct kn_lora_merge *a)
{
    (void)s, (void)a;
    return LM_UNSUPPORTED;
}
