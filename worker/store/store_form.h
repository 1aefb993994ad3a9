/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_form.h - do downloaded files have the form of an adapter at all?
 *
 * A quick look before a folder is installed: an error page, a pickle or half a file never gets into
 * the cache. Whether the adapter fits the model is the engine's question, asked afterwards.
 */
#ifndef LORAMILL_WORKER_STORE_STORE_FORM_H
#define LORAMILL_WORKER_STORE_STORE_FORM_H

#include "kernels/base.h"

#define STORE_CONFIG_MAX ((size_t)1 << 20)      /* adapter_config.json may not be larger */

/* LM_FORMAT names the file and what is wrong with it. */
lm_status store_form_check(const char *folder, struct lm_err *err);

#endif
