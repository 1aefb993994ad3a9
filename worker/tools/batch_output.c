/* SPDX-License-Identifier: Apache-2.0 */
/*
 * batch_output.c - see batch_output.h.
 *
 * A line is written with one write() of its whole text, so that a kill leaves at most one torn
 * line, the last. Resuming reads the file once, cuts after the last newline that ends a line of
 * ours, and notes of each line number which custom_id it was for, as a hash: an input that was
 * changed meanwhile has other requests under those numbers, which would never be answered.
 */
#include "worker/tools/batch_output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "worker/codec/json_tree.h"

static const char id_prefix[] = "batch_req_";

struct batch_output {
    int fd;
    char *path;
    uint32_t *done;             /* by line numbers; 0: not there */
    uint64_t n_done;            /* its size */
};

/* Never 0. */
static uint32_t mark_of(const char *custom_id)
{
    return custom_id ? (uint32_t)XXH3_64bits(custom_id, strlen(custom_id)) | 2 : 1;
}

void batch_id(char id[BATCH_ID_CHARS], uint64_t line)
{
    snprintf(id, BATCH_ID_CHARS, "%s%06" PRIu64, id_prefix, line);
}

static lm_status mark(batch_output *o, uint64_t line, uint32_t what, struct lm_err *err)
{
    if (line >= o->n_done) {
        uint64_t n = (line + 1) * 2;
        uint32_t *grown = line < UINT64_C(1) << 40 ? lm_reallocarray(o->done, n, sizeof *grown)
                                                   : NULL;
        if (!grown)
            return lm_err_set(err, LM_NOMEM, "%s: no memory for line %" PRIu64, o->path, line);
        memset(grown + o->n_done, 0, (size_t)(n - o->n_done) * sizeof *grown);
        o->done = grown;
        o->n_done = n;
    }
    o->done[line] = what;
    return LM_OK;
}

bool batch_output_has(const batch_output *o, uint64_t line)
{
    return line < o->n_done && o->done[line];
}

bool batch_output_is_of(const batch_output *o, uint64_t line, const char *custom_id)
{
    return batch_output_has(o, line) && o->done[line] == mark_of(custom_id);
}

/* The line number of one of our lines, or 0; *what: whose result it is. */
static uint64_t line_number(const char *text, size_t len, uint32_t *what)
{
    json_t *root = json_loadb(text, len, JSON_ALLOW_NUL, NULL);
    const char *id = json_string_value(json_object_get(root, "id"));
    uint64_t n = 0;
    if (id && !strncmp(id, id_prefix, sizeof id_prefix - 1))
        n = strtoull(id + sizeof id_prefix - 1, NULL, 10);
    *what = mark_of(json_string_value(json_object_get(root, "custom_id")));
    json_decref(root);
    return n;
}

static lm_status scan(batch_output *o, FILE *f, off_t *keep, struct lm_err *err)
{
    char *line = NULL;
    size_t cap = 0;
    lm_status st = LM_OK;
    for (ssize_t n; !st && (n = getline(&line, &cap, f)) > 0;) {
        if (line[n - 1] != '\n')
            break;              /* torn by a kill */
        uint32_t what;
        uint64_t number = line_number(line, (size_t)n, &what);
        if (number == 0)
            st = lm_err_set(err, LM_FORMAT, "%s: holds a line that is no batch result; --resume "
                            "continues only its own output", o->path);
        else
            st = mark(o, number, what, err);
        *keep += n;
    }
    free(line);
    return st;
}

static lm_status resume(batch_output *o, struct lm_err *err)
{
    int copy = dup(o->fd);
    FILE *f = copy < 0 ? NULL : fdopen(copy, "r");
    if (!f) {
        if (copy >= 0)
            close(copy);
        return lm_err_set(err, LM_IO, "%s: %s", o->path, strerror(errno));
    }
    off_t keep = 0;
    lm_status st = scan(o, f, &keep, err);
    fclose(f);
    if (!st && (ftruncate(o->fd, keep) || lseek(o->fd, keep, SEEK_SET) < 0))
        st = lm_err_set(err, LM_IO, "%s: %s", o->path, strerror(errno));
    return st;
}

lm_status batch_output_open(const char *path, bool resuming, batch_output **out,
                            struct lm_err *err)
{
    batch_output *o = lm_calloc(1, sizeof *o);
    if (!o || !(o->path = lm_strdup(path))) {
        free(o);
        return lm_err_set(err, LM_NOMEM, "no memory to open %s", path);
    }
    o->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | (resuming ? 0 : O_TRUNC), 0666);
    lm_status st = LM_OK;
    if (o->fd < 0)
        st = lm_err_set(err, LM_IO, "output %s: %s", path, strerror(errno));
    else if (resuming)
        st = resume(o, err);
    if (st) {
        batch_output_close(o, NULL);
        return st;
    }
    *out = o;
    return LM_OK;
}

lm_status batch_output_close(batch_output *o, struct lm_err *err)
{
    if (!o)
        return LM_OK;
    lm_status st = LM_OK;
    /* A pipe or a terminal can't be synced; that is no failure. */
    if (o->fd >= 0 && fsync(o->fd) && errno != EINVAL && errno != EROFS)
        st = lm_err_set(err, LM_IO, "%s: %s", o->path, strerror(errno));
    if (o->fd >= 0 && close(o->fd) && !st)
        st = lm_err_set(err, LM_IO, "%s: %s", o->path, strerror(errno));
    free(o->done);
    free(o->path);
    free(o);
    return st;
}

static lm_status write_all(const batch_output *o, const char *text, size_t len,
                           struct lm_err *err)
{
    while (len > 0) {
        ssize_t n = write(o->fd, text, len);
        if (n < 0 && errno != EINTR)
            return lm_err_set(err, LM_IO, "output %s: %s; free some room and run again with "
                              "--resume", o->path, strerror(errno));
        if (n > 0) {
            text += n;
            len -= (size_t)n;
        }
    }
    return LM_OK;
}

lm_status batch_output_write(batch_output *o, json_t *line, struct lm_err *err)
{
    size_t len = 0;
    char *text = line ? json_print(line, &len) : NULL;
    json_decref(line);
    if (!text)
        return lm_err_set(err, LM_NOMEM, "no memory for a result line");
    text[len] = '\n';           /* in the place of the NUL: one write for the whole line */
    lm_status st = write_all(o, text, len + 1, err);
    free(text);
    return st;
}
