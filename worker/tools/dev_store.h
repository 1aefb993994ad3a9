/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dev_store.h - a folder of PEFT adapters over HTTP, the way an object store serves them.
 *
 *   GET|HEAD /{adapter}/adapter_config.json
 *   GET|HEAD /{adapter}/adapter_model.safetensors
 *
 * with strong ETags, byte ranges and If-Range, so that interrupted downloads resume. Nothing else
 * of the folder is visible: the path is taken apart, the id is checked against the grammar of
 * adapter ids, and only the two names above are opened. Listens on 127.0.0.1.
 *
 * Threads: libmicrohttpd's own; counters are atomic.
 */
#ifndef LORAMILL_WORKER_TOOLS_DEV_STORE_H
#define LORAMILL_WORKER_TOOLS_DEV_STORE_H

#include "kernels/base.h"

typedef struct dev_store dev_store;

/* port 0: any free one. */
lm_status dev_store_new(const char *folder, int port, dev_store **out, struct lm_err *err);
void dev_store_free(dev_store *s);
int dev_store_port(const dev_store *s);

/* How many adapters lie below a folder. */
int dev_store_count(const char *folder);

struct dev_store_stats { uint64_t requests, adapters, not_found, bytes; };
void dev_store_stats(const dev_store *s, struct dev_store_stats *out);

#endif
