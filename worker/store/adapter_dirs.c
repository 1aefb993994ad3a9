/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_dirs.c - walks a folder of adapters. Names that are no valid id are not entered, so
 * hidden folders, temporary files and "..", whatever they hold, are never taken for adapters.
 */
#include "worker/store/adapter_dirs.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"

#define MAX_PATH 4096

struct walk {
    adapter_dirs_fn *fn;
    void *ctx;
    struct lm_err *err;
};

static lm_status walk_dir(const struct walk *w, const char *dir, const char *id);

static lm_status visit(const struct walk *w, const char *dir, const char *id)
{
    char config[MAX_PATH];
    int n = snprintf(config, sizeof config, "%s/adapter_config.json", dir);
    if (n < 0 || (size_t)n >= sizeof config)
        return lm_err_set(w->err, LM_TOO_LARGE, "path too long: %s", dir);
    if (access(config, R_OK) == 0)
        return w->fn(w->ctx, id, dir, w->err);
    return walk_dir(w, dir, id);
}

static lm_status walk_entry(const struct walk *w, const char *dir, const char *id,
                            const struct dirent *e)
{
    char child[MAX_PATH], child_id[ENGINE_ADAPTER_ID_MAX + 2];
    if (engine_adapter_id_check(e->d_name, strlen(e->d_name), NULL) != LM_OK)
        return LM_OK;
    int n = snprintf(child_id, sizeof child_id, "%s%s%s", id, *id ? "/" : "", e->d_name);
    int m = snprintf(child, sizeof child, "%s/%s", dir, e->d_name);
    if (n > ENGINE_ADAPTER_ID_MAX || m < 0 || (size_t)m >= sizeof child)
        return LM_OK;
    return visit(w, child, child_id);
}

static lm_status walk_dir(const struct walk *w, const char *dir, const char *id)
{
    struct dirent **entry;
    int n = scandir(dir, &entry, NULL, alphasort);
    if (n < 0)                  /* a plain file beside the folders is no adapter */
        return *id ? LM_OK : lm_err_set(w->err, LM_NOT_FOUND, "adapters folder %s: %s", dir,
                                        strerror(errno));
    lm_status st = LM_OK;
    for (int i = 0; i < n; i++) {
        if (st == LM_OK)
            st = walk_entry(w, dir, id, entry[i]);
        free(entry[i]);
    }
    free(entry);
    return st;
}

lm_status adapter_dirs_each(const char *root, adapter_dirs_fn *fn, void *ctx, struct lm_err *err)
{
    const struct walk w = { fn, ctx, err };
    return walk_dir(&w, root, "");
}
