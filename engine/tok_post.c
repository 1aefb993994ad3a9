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

static lm_status parse(struct tok_post *p, json_t *j, int depth, int *templates,
                       struct lm_err *err)
{
    const char *type = tok_json_type(j, WHERE, err);
    json_t *list, *v;
    size_t i;
    if (!type)
        return LM_FORMAT;
    if (strcmp(type, "ByteLevel") == 0)
        return LM_OK;
    if (strcmp(type, "TemplateProcessing") == 0) {
        if ((*templates)++)
            return lm_err_set(err, LM_UNSUPPORTED, WHERE ": more than one TemplateProcessing");
        return template_single(p, j, err);
    }
    if (strcmp(type, "Sequence") != 0)
        return tok_unsupported(err, WHERE, type);
    if (depth == TOK_MAX_DEPTH)
        return lm_err_set(err, LM_UNSUPPORTED, WHERE ": Sequence nested too deeply");
    lm_status st = tok_json_array(j, "processors", WHERE, &list, err);
    if (st)
        return st;
    json_array_foreach(list, i, v) {
        if ((st = parse(p, v, depth + 1, templates, err)))
            return st;
    }
    return LM_OK;
}

lm_status tok_post_parse(struct tok_post *p, json_t *j, struct lm_err *err)
{
    int templates = 0;
    p->repeat = 1;
    return !j || json_is_null(j) ? LM_OK : parse(p, j, 0, &templates, err);
}

void tok_post_release(struct tok_post *p)
{
    free(p->before);
    free(p->after);
    *p = (struct tok_post){0};
}
