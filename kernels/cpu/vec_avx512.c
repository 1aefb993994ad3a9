/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_avx512.c - the vector routines with 16 floats a register. See vec_impl.h.
 */
#if defined(__x86_64__)
#define VW 16
#define VEC_TABLE cpu_vec_avx512
#define VEC_NAME "avx512"
#define VEC_ISA CPU_ISA_AVX512
#include "kernels/cpu/vec_impl.h"
#endif
