/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_int.h - the store's seam to the engine. Tests put their own functions here; everyone else
 * uses store_new().
 */
#ifndef LORAMILL_WORKER_STORE_STORE_INT_H
#define LORAMILL_WORKER_STORE_STORE_INT_H

#include "worker/store/store.h"

struct store_hooks {
    engine_adapter *(*find)(engine *e, const char *id);
    lm_status (*load)(engine *e, const char *id, const char *dir, engine_adapter **out,
                      struct lm_err *err);
    engine_adapter *(*ref)(engine_adapter *a);
    void (*unref)(engine_adapter *a);
    int retry_base_ms;          /* 0: 200 */
};

lm_status store_new_with(const struct store_config *cfg, const struct store_hooks *hooks,
                         store **out, struct lm_err *err);

#endif
