/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_collect_outcomes.c - sets of ids; see cmd_collect_outcomes.h.
 *
 * One hash table, jansson's, from a tagged key to a state. Tags keep an id apart from a line that
 * looks like one: "i" + id, "l" + the line's bytes, "s" + the place a dead letter came from. In a
 * job from lines the table is filled first and an unknown key is foreign; else it fills as
 * outcomes come.
 */
#include "worker/tools/cmd_collect_outcomes.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum state { AWAITED, REPLIED, DEAD };

struct outcomes {
    json_t *table;              /* tagged key -> integer, a state */
    bool by_lines;
    uint64_t awaited, replies, dead_letters, repeated, foreign;
};

outcomes *outcomes_new(void)
{
    outcomes *j = lm_calloc(1, sizeof *j);
    if (j && !(j->table = json_object())) {
        free(j);
        j = NULL;
    }
    return j;
}

void outcomes_free(outcomes *j)
{
    if (!j)
        return;
    json_decref(j->table);
    free(j);
}

/* ---- keys ------------------------------------------------------------------------------- */

struct key { char *bytes; size_t len; };

static struct key key_make(char tag, const void *bytes, size_t len)
{
    struct key k = { lm_malloc(len + 1), len + 1 };
    if (k.bytes) {
        k.bytes[0] = tag;
        if (len > 0)
            memcpy(k.bytes + 1, bytes, len);
    }
    return k;
}

/* The key of a prompt as it was sent: its id where it has one. */
static struct key key_of_prompt(const void *value, size_t len)
{
    json_t *root = value ? json_loadb(value, len, JSON_ALLOW_NUL, NULL) : NULL;
    const json_t *id = json_object_get(root, "id");
    struct key k;
    if (json_is_string(id) && json_string_length(id) > 0)
        k = key_make('i', json_string_value(id), json_string_length(id));
    else
        k = key_make('l', value, value ? len : 0);
    json_decref(root);
    return k;
}

/* The state under a key: NULL when there is none. */
static json_t *lookup(const outcomes *j, const struct key *k)
{
    return k->bytes ? json_object_getn(j->table, k->bytes, k->len) : NULL;
}

static lm_status insert(outcomes *j, const struct key *k, enum state state)
{
    if (!k->bytes || json_object_setn_new_nocheck(j->table, k->bytes, k->len, json_integer(state)))
        return LM_NOMEM;
    return LM_OK;
}

/* ---- awaiting --------------------------------------------------------------------------- */

lm_status outcomes_await_line(outcomes *j, const char *line, size_t len)
{
    lm_status st = LM_OK;
    struct key k = key_of_prompt(line, len);
    j->by_lines = true;
    if (!k.bytes) {
        st = LM_NOMEM;
    } else if (!lookup(j, &k)) {
        st = insert(j, &k, AWAITED);
        j->awaited += st == LM_OK;
    }
    free(k.bytes);
    return st;
}

void outcomes_await_count(outcomes *j, uint64_t n)
{
    j->awaited = n;
}

/* ---- outcomes --------------------------------------------------------------------------- */

static enum outcome_news settle(outcomes *j, const struct key *k, enum state outcome)
{
    json_t *now = lookup(j, k);
    if (!now && j->by_lines) {
        j->foreign++;
        return NEWS_FOREIGN;
    }
    enum state before = now ? (enum state)json_integer_value(now) : AWAITED;
    if (before == REPLIED || before == outcome) {
        j->repeated++;
        return NEWS_REPEATED;
    }
    /* Without memory the outcome still counts; only a repeat would go unnoticed. */
    if (!now)
        (void)insert(j, k, outcome);
    else
        json_integer_set(now, outcome);
    j->dead_letters -= before == DEAD;
    *(outcome == REPLIED ? &j->replies : &j->dead_letters) += 1;
    return before == DEAD ? NEWS_HEALED : NEWS_NEW;
}

enum outcome_news outcomes_reply(outcomes *j, const char *id, size_t len)
{
    struct key k = key_make('i', id, len);
    enum outcome_news news = settle(j, &k, REPLIED);
    free(k.bytes);
    return news;
}

enum outcome_news outcomes_dead_letter(outcomes *j, const void *value, size_t len,
                                       const char *source)
{
    struct key k = j->by_lines ? key_of_prompt(value, len)
                               : key_make('s', source, strlen(source));
    enum outcome_news news = settle(j, &k, DEAD);
    free(k.bytes);
    return news;
}

void outcomes_counts(const outcomes *j, struct outcome_counts *out)
{
    uint64_t ended = j->replies + j->dead_letters;
    *out = (struct outcome_counts){
        .awaited = j->awaited, .replies = j->replies, .dead_letters = j->dead_letters,
        .missing = j->awaited > ended ? j->awaited - ended : 0,
        .repeated = j->repeated, .foreign = j->foreign,
    };
}

bool outcomes_complete(const outcomes *j)
{
    return j->awaited > 0 && j->replies + j->dead_letters >= j->awaited;
}

void outcomes_each_missing(const outcomes *j, void (*call)(void *user, const char *id, size_t len),
                      void *user)
{
    const char *key;
    size_t len;
    json_t *state;
    json_object_keylen_foreach(j->table, key, len, state) {
        if (j->by_lines && json_integer_value(state) == AWAITED)
            call(user, key[0] == 'i' ? key + 1 : NULL, len - 1);
    }
}
