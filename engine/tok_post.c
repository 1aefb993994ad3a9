/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_post.c - post-processors: TemplateProcessing, ByteLevel (which only trims offsets) and
 * Sequence of these.
 *
 * Only the template for a single text matters here. It is reduced to the ids before and after the
 * text; a template that repeats the text, or asks for a second one, is refused, and so is more than
 * one template, which the reference can't run either.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#define WHERE "post_processor"

struct side {
    int32_t **ids;
    int *n;
};

static lm_status add_id(struct side to, json_int_t id, struct lm_err *err)
{
    if (id < 0 || id >= TOK_MAX_ID)
        return lm_err_set(err, LM_FORMAT, WHERE ": id %lld is out of range", (long long)id);
    int32_t *p = lm_reallocarray(*to.ids, (size_t)*to.n + 1, sizeof *p);
    if (!p)
        return tok_nomem(err);
    *to.ids = p;
    p[(*to.n)++] = (int32_t)id;
    return LM_OK;
}

static lm_status special(struct side to, json_t *piece, json_t *tokens, struct lm_err *err)
{
    const char *name;
    size_t n, i;
    json_t *ids, *v;
    lm_status st = tok_json_string(piece, "id", WHERE, &name, &n, err);
    if (st)
        return st;
    json_t *token = json_object_get(tokens, name);
    if (!token)
        return lm_err_set(err, LM_FORMAT, WHERE ": \"%.64s\" is not in special_tokens", name);
    if ((st = tok_json_array(token, "ids", WHERE, &ids, err)))
        return st;
    json_array_foreach(ids, i, v) {
        if (!json_is_integer(v))
            return lm_err_set(err, LM_FORMAT, WHERE ": ids of \"%.64s\" must be integers", name);
        if ((st = add_id(to, json_integer_value(v), err)))
            return st;
    }
    return LM_OK;
}

static lm_status template_single(struct tok_post *p, json_t *j, struct lm_err *err)
{
    json_t *pieces, *piece, *tokens = json_object_get(j, "special_tokens");
    size_t i;
    lm_status st = tok_json_array(j, "single", WHERE, &pieces, err);
    if (st)
        return st;
    p->repeat = 0;
    json_array_foreach(pieces, i, piece) {
        json_t *sp = json_object_get(piece, "SpecialToken");
        json_t *seq = json_object_get(piece, "Sequence");
        const char *id = json_string_value(json_object_get(seq, "id"));
        if (sp) {
            struct side to = p->repeat ? (struct side){&p->after, &p->n_after}
                                       : (struct side){&p->before, &p->n_before};
            if ((st = special(to, sp, tokens, err)))
                return st;
        } else if (id && strcmp(id, "A") == 0 && !p->repeat) {
            p->repeat = 1;
        } else {
            return lm_err_set(err, LM_UNSUPPORTED, WHERE ": \"single\" may hold special tokens and "
                              "the text (Sequence A) once; nothing else is supported");
        }
    }
    return LM_OK;
}

struct reading { struct tok_post *p; int templates; };

static lm_status parse_one(void *ctx, json_t *j, const char *type, struct lm_err *err)
{
    struct reading *r = ctx;
    if (strcmp(type, "ByteLevel") == 0)
        return LM_OK;
    if (strcmp(type, "TemplateProcessing") != 0)
        return tok_unsupported(err, WHERE, type);
    if (r->templates++)
        return lm_err_set(err, LM_UNSUPPORTED, WHERE ": more than one TemplateProcessing");
    return template_single(r->p, j, err);
}

lm_status tok_post_parse(struct tok_post *p, json_t *j, struct lm_err *err)
{
    struct reading r = { p, 0 };
    p->repeat = 1;
    return tok_json_parts(j, "processors", WHERE, parse_one, &r, err);
}

void tok_post_release(struct tok_post *p)
{
    free(p->before);
    free(p->after);
    *p = (struct tok_post){0};
}
