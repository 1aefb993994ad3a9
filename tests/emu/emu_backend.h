/* SPDX-License-Identifier: Apache-2.0 */
/*
 * emu_backend.h - opens the emulated device.
 */
#ifndef LORAMILL_TEST_EMU_BACKEND_H
#define LORAMILL_TEST_EMU_BACKEND_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry is chosen for `sms` multiprocessors, kernels for compute capability `cc` (80, 90).
 * kn_close() it. */
kn_device *emu_device_new(int sms, int cc);

/* What a kernel reported (enum cuda_fault), 0 if nothing; and forgets it. */
int emu_take_fault(void);

#ifdef __cplusplus
}
#endif
#endif
