/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim.h - what a simulated device has counted, for tests and for programs that study policies. The
 * engine and the worker know kernels.h only.
 */
#ifndef LORAMILL_KERNELS_SIM_SIM_H
#define LORAMILL_KERNELS_SIM_SIM_H

#include "kernels/kernels.h"

/* What time went into. */
enum sim_kind { SIM_GEMM, SIM_ATTENTION, SIM_LORA, SIM_COMM, SIM_OTHER, SIM_KINDS };

/* Since the device was opened. Bytes are what the cost model says was moved, not what was really
 * copied by this process. */
struct sim_counters {
    int64_t ns[SIM_KINDS];      /* device time, summed over streams */
    int64_t launches[SIM_KINDS];
    int64_t steps;              /* token embeddings: every step begins with one */
    int64_t bytes_in, bytes_out;            /* plain copies over PCIe */
    int64_t cells_in, cells_out;            /* scattered and gathered cells over PCIe */
    int64_t weight_bytes, kv_read_bytes, kv_write_bytes, lora_bytes;    /* device memory */
    int64_t comm_bytes;         /* sent by each device of the group */
    int64_t copies;             /* of all kinds, over PCIe */
    size_t mem_used, mem_peak;  /* device memory, allocations and matrices */
};

/* LM_INVALID when the device is of another backend. */
lm_status kn_sim_counters(kn_device *dev, struct sim_counters *out);

#endif
