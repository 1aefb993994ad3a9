/* SPDX-License-Identifier: Apache-2.0 */
/* check_attention.c - rope_kv and paged attention against the CPU. */
#include "check.h"

void check_attention(struct gpu_check *c)
{
    (void)c;
}

void bench_attention(struct gpu_check *c)
{
    (void)c;
}
