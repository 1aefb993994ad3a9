/* SPDX-License-Identifier: Apache-2.0 */
/* A stand-in: bf16 as bits, and the two conversions. */
#ifndef LORAMILL_TEST_EMU_BF16_H
#define LORAMILL_TEST_EMU_BF16_H
struct __nv_bfloat16 { unsigned short x; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
static inline float __bfloat162float(__nv_bfloat16 h)
{
    unsigned u = (unsigned)h.x << 16;
    float f;
    __builtin_memcpy(&f, &u, sizeof f);
    return f;
}
static inline __nv_bfloat16 __float2bfloat16(float f)
{
    unsigned u;
    __builtin_memcpy(&u, &f, sizeof u);
    return { (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16) };
}
#endif
