/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rows.cu - operations on each token's row alone.
 */
#include "kernels/cuda/cuda_int.h"

#define STUB(op, args)                                                                         \
    extern "C" lm_status cuda_op_##op(kn_stream *s, const struct kn_##args *a)                 \
    {                                                                                          \
        (void)s, (void)a;                                                                      \
        return LM_UNSUPPORTED;                                                                 \
    }
STUB(embed, embed)
STUB(rmsnorm, rmsnorm)
STUB(silu_mul, silu_mul)
STUB(gather_rows, gather_rows)
STUB(feed, feed)
STUB(sample, sample)
STUB(gemm, gemm)

extern "C" size_t cuda_sample_workspace(kn_device *dev, int max_rows, int vocab)
{
    (void)dev;
    return (size_t)max_rows * (size_t)vocab * 8;
}
