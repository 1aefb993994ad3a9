/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_avx2.c - the vector routines with 8 floats a register. See vec_impl.h.
 */
#if defined(__x86_64__)
#define VW 8
#define VEC_TABLE cpu_vec_avx2
#define VEC_NAME "avx2"
#define VEC_ISA CPU_ISA_AVX2
#include "kernels/cpu/vec_impl.h"
#endif
