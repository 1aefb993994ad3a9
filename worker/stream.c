/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c - see stream.h.
 */
#include "worker/stream.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

static void new_generation(struct stream *s)
{
    uint64_t id;
    if (getrandom(&id, sizeof id, 0) != sizeof id)
        id = (uint64_t)lm_now_us() * 0x9e3779b97f4a7c15u ^ (uint64_t)(uintptr_t)s;
    snprintf(s->generation, sizeof s->generation, "%016" PRIx64, id);
    s->seq = 0;
}

struct stream *stream_new(int n_choices)
{
    struct stream *s = lm_calloc(1, sizeof *s);
    if (s)
        s->text = lm_calloc((size_t)LM_MAX(n_choices, 1), sizeof *s->text);
    if (!s || !s->text) {
        free(s);
        return NULL;
    }
    s->n = LM_MAX(n_choices, 1);
    new_generation(s);
    return s;
}

void stream_free(struct stream *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->n; i++)
        free(s->text[i].s);
    free(s->text);
    free(s);
}

void stream_restart(struct stream *s)
{
    for (int i = 0; i < s->n; i++)
        s->text[i].len = 0;
    s->ended = false;
    s->broken = false;
    new_generation(s);
}

lm_status stream_add(struct stream *s, int choice, char *text, size_t len)
{
    if (choice < 0 || choice >= s->n || s->broken) {
        free(text);
        return LM_OK;
    }
    struct stream_text *t = &s->text[choice];
    if (!t->len) {                      /* the common case: nothing to copy */
        free(t->s);
        *t = (struct stream_text){ text, len, len + 1 };
        return LM_OK;
    }
    if (t->len + len + 1 > t->cap) {
        size_t cap = LM_MAX(t->cap * 2, t->len + len + 1);
        char *grown = lm_reallocarray(t->s, cap, 1);
        if (!grown) {
            free(text);
            s->broken = true;
            return LM_NOMEM;
        }
        t->s = grown;
        t->cap = cap;
    }
    memcpy(t->s + t->len, text, len + 1);
    t->len += len;
    free(text);
    return LM_OK;
}

bool stream_has_text(const struct stream *s)
{
    for (int i = 0; i < s->n; i++)
        if (s->text[i].len)
            return !s->broken;
    return false;
}

struct engine_result *stream_take(struct stream *s)
{
    struct engine_result *r = engine_result_new(s->n);
    if (!r)
        return NULL;
    for (int i = 0; i < s->n; i++) {
        struct stream_text *t = &s->text[i];
        if (!t->len)
            continue;
        struct engine_choice *c = &r->choices[r->n_choices++];
        c->index = i;
        c->text = t->s;
        c->text_len = t->len;
        *t = (struct stream_text){ 0 };
    }
    return r;
}

void stream_give_back(struct stream *s, struct engine_result *text)
{
    for (int i = 0; i < text->n_choices; i++) {
        struct engine_choice *c = &text->choices[i];
        struct stream_text later = s->text[c->index];
        s->text[c->index] = (struct stream_text){ c->text, c->text_len, c->text_len + 1 };
        c->text = NULL;
        if (later.len)
            stream_add(s, c->index, later.s, later.len);
        else
            free(later.s);
    }
    engine_result_free(text);
}
