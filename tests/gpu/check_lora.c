/* SPDX-License-Identifier: Apache-2.0 */
/* check_lora.c - shrink, expand and merge against the CPU. */
#include "check.h"

void check_lora(struct gpu_check *c)
{
    (void)c;
}

void bench_lora(struct gpu_check *c)
{
    (void)c;
}
