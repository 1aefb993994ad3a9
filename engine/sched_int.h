/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched_int.h - what sched.c and sched_admit.c share: the budgets of a plan under way and its
 * scratch memory. State is const while a plan is made, so what the plan knows of a sequence or an
 * adapter is not noted in it but in small tables here, which a stamp empties.
 */
#ifndef LORAMILL_ENGINE_SCHED_INT_H
#define LORAMILL_ENGINE_SCHED_INT_H

#include "engine/sched.h"

/* Of the order of service, so many are read at most, as those that wait for a sibling's prompt are
 * left out of the lookahead: else a few requests of many choices would fill it. */
#define MAX_READS (4 * SCHED_LOOKAHEAD)

/* What became of a waiting sequence in this plan. */
enum fate {
    FATE_UNSEEN,                /* not looked at */
    FATE_COPY,                  /* its weights are on their way, or its sibling's prompt */
    FATE_NO_ROOM,
    FATE_ADMITTED,
    FATE_FIRST,                 /* admitted ahead of its turn, by right: bounds and deadlines */
    FATE_EXPIRED,
};

/* A table of pointers, open addressing; an entry is there if its stamp is the plan's. */
struct known {
    const void *key;
    uint32_t stamp;
    uint8_t fate;               /* of a sequence */
    bool charged, expected, lane;       /* of an adapter */
};

struct known_table {
    struct known *at;
    uint32_t mask, stamp;
};

/* A lane of the batch: the next of those who wait for an adapter that is in it. */
struct lane {
    struct seq *head;
    int skipped;                /* in a row */
};

struct sched_scratch {
    struct known_table seqs, adapters;
    struct queue_turn *turn;    /* [MAX_READS] */
    struct seq **order;         /* [SCHED_LOOKAHEAD] the order of service, as far as read */
    struct lane *lane;          /* [cap_lanes] a heap by rank of the heads */
    int n_order, n_lanes, cap_lanes;
    int reads;                  /* of the cursor, left */
    struct queue_cursor cursor;
};

/* NULL: not there. */
struct known *known_find(const struct known_table *t, const void *key);
/* There afterwards; the caller bounds how many. */
struct known *known_get(struct known_table *t, const void *key);

/* How many of `n` tokens the step still takes. */
int plan_fit_tokens(const struct plan *p, const struct seq *s, int n);
void plan_add_item(struct plan *p, struct seq *s, int n_tok);

/* The third pass: who joins the n_running, what is loaded, who can't be in time any more. */
void plan_expiries(const struct sched_view *v, struct plan *p);
void plan_admissions(const struct sched_view *v, struct plan *p, int n_running);

#endif
