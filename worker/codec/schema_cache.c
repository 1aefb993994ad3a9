/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_cache.c - writers' schemas by id or GUID; see schema_cache.h.
 *
 * A flat table with linear search: a topic has a handful of schemas, so the first places are hit,
 * and a full table of strangers costs microseconds next to a request to the registry.
 */
#include "worker/codec/schema_cache.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ENTRIES = 1024, UNKNOWN_US = 10 * 1000 * 1000 };

struct entry {
    struct schema_key key;
    struct avro_plan *plan;     /* NULL: a refusal, in `err` */
    struct lm_err *err;
    int64_t until;              /* lm_now_us(); 0: for ever */
    uint64_t used;              /* tick of the last use */
};

struct schema_cache {
    registry *registry;
    uint64_t tick;
    int n;
    struct entry entries[MAX_ENTRIES];
};

schema_cache *schema_cache_new(registry *r)
{
    schema_cache *c = lm_calloc(1, sizeof *c);
    if (c)
        c->registry = r;
    return c;
}

static void entry_release(struct entry *e)
{
    avro_plan_free(e->plan);
    free(e->err);
    memset(e, 0, sizeof *e);
}

void schema_cache_free(schema_cache *c)
{
    if (!c)
        return;
    for (int i = 0; i < c->n; i++)
        entry_release(&c->entries[i]);
    free(c);
}

bool schema_key_equal(const struct schema_key *a, const struct schema_key *b)
{
    if (a->is_guid != b->is_guid)
        return false;
    return a->is_guid ? memcmp(a->guid, b->guid, sizeof a->guid) == 0 : a->id == b->id;
}

static struct entry *find(schema_cache *c, const struct schema_key *key)
{
    for (int i = 0; i < c->n; i++)
        if (schema_key_equal(&c->entries[i].key, key))
            return &c->entries[i];
    return NULL;
}

/* A free place: a new one, or that of the refusal, else the plan, that was not used longest. */
static struct entry *make_room(schema_cache *c)
{
    if (c->n < MAX_ENTRIES)
        return &c->entries[c->n++];
    struct entry *oldest = &c->entries[0];
    for (int i = 1; i < c->n; i++) {
        struct entry *e = &c->entries[i];
        if (!e->plan != !oldest->plan ? !e->plan : e->used < oldest->used)
            oldest = e;
    }
    entry_release(oldest);
    return oldest;
}

/* NULL when memory is exhausted: then it is asked for again next time. */
static struct lm_err *copy_error(const struct lm_err *err)
{
    struct lm_err *copy = lm_malloc(sizeof *copy);
    if (copy)
        *copy = *err;
    return copy;
}

static void forget(schema_cache *c, struct entry *e)
{
    entry_release(e);
    c->n--;
    *e = c->entries[c->n];
    memset(&c->entries[c->n], 0, sizeof *e);
}

static lm_status answer(schema_cache *c, struct entry *e, struct avro_plan **out,
                        struct lm_err *err)
{
    e->used = ++c->tick;
    if (!e->plan) {
        if (err)
            *err = *e->err;
        return e->err->code;
    }
    *out = e->plan;
    return LM_OK;
}

lm_status schema_cache_find(schema_cache *c, const struct schema_key *key,
                            struct avro_plan **out, struct lm_err *err)
{
    struct entry *e = find(c, key);
    if (e && e->until && lm_now_us() >= e->until) {
        forget(c, e);
        e = NULL;
    }
    return e ? answer(c, e, out, err) : LM_BUSY;
}

lm_status schema_cache_learn(schema_cache *c, const struct schema_key *key, const char *text,
                             const struct lm_err *why, struct avro_plan **out, struct lm_err *err)
{
    struct lm_err failure = { LM_OK, "" };
    struct avro_plan *plan = NULL;
    if (!text)
        failure = *why;
    lm_status st = text ? avro_plan_new(text, strlen(text), &plan, &failure) : failure.code;
    struct lm_err *kept = st ? copy_error(&failure) : NULL;
    if (st && (lm_status_disposition(st) != LM_DO_REFUSE || !kept)) {
        free(kept);
        if (err)
            *err = failure;
        return st;
    }
    struct entry *e = make_room(c);
    *e = (struct entry){ *key, plan, kept, 0, 0 };
    if (st == LM_NOT_FOUND)
        e->until = lm_now_us() + UNKNOWN_US;
    return answer(c, e, out, err);
}

lm_status schema_cache_get(schema_cache *c, const struct schema_key *key,
                           struct avro_plan **out, struct lm_err *err)
{
    char *text = NULL;
    struct lm_err why = { LM_OK, "" };
    lm_status st = schema_cache_find(c, key, out, err);
    if (st != LM_BUSY)
        return st;
    if (key->is_guid)
        registry_by_guid(c->registry, key->guid, &text, &why);
    else
        registry_by_id(c->registry, key->id, &text, &why);
    st = schema_cache_learn(c, key, text, &why, out, err);
    free(text);
    return st;
}
