/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_generic.c - the vector routines with 4 floats a register, for any processor. See vec_impl.h.
 */
#define VW 4
#define VEC_TABLE cpu_vec_generic
#define VEC_NAME "generic"
#define VEC_ISA CPU_ISA_GENERIC
#include "kernels/cpu/vec_impl.h"
