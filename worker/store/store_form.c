/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_form.c - the form of downloaded files; see store_form.h.
 *
 * A safetensors file is 8 bytes of little-endian header length, a JSON object, and data; the
 * largest end under "data_offsets" says how long the data must be. Comparing that with the file
 * finds a body that was cut by a server which closes instead of announcing a length.
 */
#include "worker/store/store_form.h"

#include <endian.h>
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "worker/store/cache.h"

#define HEADER_MAX ((uint64_t)32 << 20)

static lm_status read_all(const char *path, uint64_t at, uint64_t len, char **out,
                          struct lm_err *err)
{
    FILE *f = fopen(path, "re");
    char *text = lm_malloc(len);
    lm_status st = LM_OK;
    if (!f || fseeko(f, (off_t)at, SEEK_SET) != 0)
        st = lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
    else if (!text)
        st = lm_err_set(err, LM_NOMEM, "%s: no memory for %llu bytes", path,
                        (unsigned long long)len);
    else if (fread(text, 1, len, f) != len)
        st = lm_err_set(err, LM_FORMAT, "%s: shorter than it says", path);
    if (f)
        fclose(f);
    if (st != LM_OK) {
        free(text);
        text = NULL;
    }
    *out = text;
    return st;
}

static lm_status parse_object(const char *path, uint64_t at, uint64_t len, json_t **out,
                              struct lm_err *err)
{
    json_error_t je;
    char *text;
    *out = NULL;
    lm_status st = read_all(path, at, len, &text, err);
    if (st != LM_OK)
        return st;
    json_t *root = json_loadb(text, len, 0, &je);
    free(text);
    if (!json_is_object(root)) {
        json_decref(root);
        return lm_err_set(err, LM_FORMAT, "%s: not a JSON object%s%s", path,
                          root ? "" : ": ", root ? "" : je.text);
    }
    *out = root;
    return LM_OK;
}

/* Where the data ends, as the header has it. */
static uint64_t data_end(json_t *header)
{
    const char *name;
    json_t *tensor;
    uint64_t end = 0;
    json_object_foreach(header, name, tensor) {
        const json_t *offsets = json_object_get(tensor, "data_offsets");
        json_int_t e = json_integer_value(json_array_get(offsets, 1));
        end = LM_MAX(end, e > 0 ? (uint64_t)e : 0);
    }
    return end;
}

static lm_status check_weights(const char *path, uint64_t size, struct lm_err *err)
{
    uint64_t header_len;
    char *prefix;
    json_t *header;
    if (size < sizeof header_len)
        return lm_err_set(err, LM_FORMAT, "%s: %llu bytes are no safetensors file", path,
                          (unsigned long long)size);
    lm_status st = read_all(path, 0, sizeof header_len, &prefix, err);
    if (st != LM_OK)
        return st;
    memcpy(&header_len, prefix, sizeof header_len);
    free(prefix);
    header_len = le64toh(header_len);
    if (header_len < 2 || header_len > HEADER_MAX || header_len > size - sizeof header_len)
        return lm_err_set(err, LM_FORMAT, "%s: not a safetensors file (its header would have %llu "
                          "of %llu bytes)", path, (unsigned long long)header_len,
                          (unsigned long long)size);
    st = parse_object(path, sizeof header_len, header_len, &header, err);
    if (st != LM_OK)
        return st;
    uint64_t data = size - sizeof header_len - header_len, wanted = data_end(header);
    json_decref(header);
    if (data != wanted)
        return lm_err_set(err, LM_FORMAT, "%s: %llu bytes of tensors, its header says %llu", path,
                          (unsigned long long)data, (unsigned long long)wanted);
    return LM_OK;
}

lm_status store_form_check(const char *folder, struct lm_err *err)
{
    char config[PATH_MAX], weights[PATH_MAX];
    struct stat cs, ws;
    json_t *root;
    snprintf(config, sizeof config, "%s/%s", folder, CACHE_CONFIG);
    snprintf(weights, sizeof weights, "%s/%s", folder, CACHE_WEIGHTS);
    if (stat(config, &cs) != 0 || stat(weights, &ws) != 0)
        return lm_err_set(err, LM_IO, "%s: %s", folder, strerror(errno));
    lm_status st = parse_object(config, 0, (uint64_t)cs.st_size, &root, err);
    if (st != LM_OK)
        return st;
    json_decref(root);
    return check_weights(weights, (uint64_t)ws.st_size, err);
}
