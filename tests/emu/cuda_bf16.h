/* SPDX-License-Identifier: Apache-2.0 */
/* A stand-in: kernels that the emulator runs treat bf16 as bits. */
#ifndef LORAMILL_TEST_EMU_BF16_H
#define LORAMILL_TEST_EMU_BF16_H
struct __nv_bfloat16 { unsigned short x; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
#endif
