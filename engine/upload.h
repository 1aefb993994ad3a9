/* SPDX-License-Identifier: Apache-2.0 */
/*
 * upload.h - tensors from their files to the device's matrices, on several threads.
 *
 *   upload_new -> upload_add ... -> upload_start -> (the caller does something else) -> upload_wait
 *
 * What was added is cut into pieces of some MiB, in the order of the files. Each thread has a
 * pinned buffer and takes the next piece: it reads the file into the buffer (pread, so a cold file
 * is read in large requests, several at a time) and hands it to kn_mat_upload(), which sends pinned
 * memory off as it is. So reading and sending overlap between threads, and the slower of the two,
 * the disk or the way to the device, sets the speed.
 *
 * The first piece to fail, in that order, is the error; the others are then left where they are.
 */
#ifndef LORAMILL_ENGINE_UPLOAD_H
#define LORAMILL_ENGINE_UPLOAD_H

#include "engine/safetensors.h"

typedef struct upload upload;

/* Rows [row, row + rows) and columns [col, col + cols) of a two-dimensional tensor, to the matrix's
 * rows from row0 on. */
struct upload_rect {
    kn_mat *to;
    int row0;
    const struct st_tensor *from;
    int row, rows, col, cols;
};

/* Files, tensors, matrices and device must outlive it. */
lm_status upload_new(const safetensors *files, kn_device *dev, upload **out, struct lm_err *err);
lm_status upload_add(upload *u, const struct upload_rect *r, struct lm_err *err);
/* Returns at once, threads at work; little to do, or a single core, is left to upload_wait(). */
void upload_start(upload *u);
lm_status upload_wait(upload *u, struct lm_err *err);
/* Stops what still goes on. NULL is allowed. */
void upload_free(upload *u);

/* For tests: so many threads and pieces of so many bytes whatever there is to do; 0: as it fits. */
void upload_force(int threads, size_t piece_bytes);

#endif
