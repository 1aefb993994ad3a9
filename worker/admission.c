/* SPDX-License-Identifier: Apache-2.0 */
/*
 * admission.c - how much is read ahead, and of which topics; consumer thread.
 *
 * Four budgets bound what a worker holds at any backlog: prompts that are not yet in the engine
 * (intake.max_messages), of everything read and not yet answered its number
 * (in_flight.max_messages) and bytes (intake.max_bytes), and the tokens of what is not yet
 * generated (intake.max_tokens), of each prompt an eighth of them at most. When one is full,
 * partitions pause; when all are down to half, they resume.
 *
 * Priorities. The most urgent of the assigned topics (topics.priorities) may fill the budgets
 * whole, the others three quarters of them. So there is always room to read an urgent prompt,
 * however long the queue of the others is; intake and engine then take it first. The others resume
 * at three eighths, and beside them the most urgent at seven (`shares`). What a prompt may generate
 * counts only once its adapter is here, when hundreds that waited for one may come at once: so
 * that of the others counts as far as three quarters have room (worker_count_generation()).
 *
 * What waits for its fence to be committed (isolation.c) counts as not yet in the engine: it goes
 * there with the commit's answer. That takes a moment, so the loop awaits it rather than pause.
 *
 * A partition also pauses by itself while its offset map is near its limit (see ledger.h), while
 * many of its prompts wait for suspects (isolation.c), and for good while it is being taken away.
 *
 * A pause throws the client's prefetched records away, and it is half a second until they flow
 * again. So before pausing the loop waits for the load to fall by itself (`settle_ms`): 40 ms where
 * more urgent topics could be read meanwhile, 250 where nothing could. It only pauses for what
 * takes long, so that it can poll on, and only changes are told to the client. Pause state survives
 * revocation inside librdkafka, so it is set anew for what is assigned.
 */
#include "worker/consumer_int.h"

enum {
    CROWDED_LOOK_US = 100000,
    MARK_WAIT_MS = 250,         /* for a commit's answer */
    TURN_MS = 2,
};

/* How long a burst may take before it costs a pause, by rank. */
static const int settle_ms[CONSUMER_RANKS] = { 250, 40 };

static int64_t part_of(int64_t budget, int64_t share)
{
    return LM_MAX(budget / 8 * share + budget % 8 * share / 8, 1);
}

/* `share` eighths of the budgets. */
static struct admission_limits limits_at(const consumer *c, int64_t share)
{
    const struct config *cfg = c->w->cfg;
    return (struct admission_limits){
        part_of(cfg->intake_max_messages, share), part_of(config_in_flight(cfg), share),
        part_of(cfg->intake_max_bytes, share), part_of(cfg->intake_max_tokens, share),
    };
}

/* Is any of them reached by what is held? */
static bool reached(const consumer *c, const struct admission_limits *l)
{
    struct metrics *m = &c->w->metrics;
    int64_t backlog = atomic_load(&m->backlog) + (int64_t)c->ready.length + isolation_waiting(c);
    return backlog >= l->backlog || c->held >= l->messages ||
           c->held_bytes + atomic_load(&m->reply_bytes_held) >= l->bytes ||
           atomic_load(&m->held_tokens) >= l->tokens;
}

static bool exceeds(const consumer *c, int64_t share)
{
    const struct admission_limits l = limits_at(c, share);
    return reached(c, &l);
}

/* Eighths of the budgets: [rank][resume below, pause at]. Lower topics may hold their share for as
 * long as a store is away, so beside them the most urgent resumes above it. */
static const int64_t shares[CONSUMER_RANKS][2] = { { 4, 8 }, { 3, LOWER_SHARE } };
enum { RESUME_BESIDE = 7 };

/* Until the load has fallen, or the time is over. What lets it fall may wait for this thread: a
 * transaction, or a commit with marks. `marks`: only while something waits for such a commit. */
static void await_room(consumer *c, int64_t share, int ms, bool marks)
{
    int64_t end = lm_now_us() + ms * 1000;
    while (exceeds(c, share) && (!marks || isolation_waiting(c)) && lm_now_us() < end &&
           !atomic_load(&c->w->stopping)) {
        consumer_take_finished(c, 0);
        staging_serve(c);
        isolation_serve(c);
        if (c->iso.wanted)
            commit_start(c);
        commit_serve(c, TURN_MS);
    }
}

static int most_urgent(const consumer *c)
{
    int most = INT32_MIN;
    for (size_t i = 0; i < c->n_parts; i++)
        most = LM_MAX(most, c->parts[i].lease->priority);
    return most;
}

static bool anyone_lower(const consumer *c)
{
    int most = most_urgent(c);
    for (size_t i = 0; i < c->n_parts; i++)
        if (c->parts[i].lease->priority < most)
            return true;
    return false;
}

struct admission_limits admission_limits(const consumer *c)
{
    return limits_at(c, shares[anyone_lower(c) ? 1 : 0][1]);
}

bool admission_due(const consumer *c, const struct admission_limits *limits)
{
    return c->braked || reached(c, limits);
}

/* Is the rank's state to change? */
static bool update_rank(consumer *c, int rank)
{
    if (c->full[rank]) {
        c->full[rank] = exceeds(c, rank == 0 && anyone_lower(c) ? RESUME_BESIDE : shares[rank][0]);
        return !c->full[rank];
    }
    if (!exceeds(c, shares[rank][1]) || (rank > 0 && !anyone_lower(c)))
        return false;
    await_room(c, shares[rank][1], settle_ms[rank], false);
    return c->full[rank] = exceeds(c, shares[rank][1]);
}

/* That a map comes near its limit is seen with each record (consumer.c); here, that it has room. */
static bool update_crowded(consumer *c)
{
    bool changed = c->braked;
    int64_t now = lm_now_us();
    c->braked = false;
    if (now < c->next_crowded_us)
        return changed;
    c->next_crowded_us = now + CROWDED_LOOK_US;
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        bool crowded = ledger_crowded(c->ledger, a->ref, a->crowded) ||
                       isolation_crowded(a, a->crowded);
        changed |= crowded != a->crowded;
        a->crowded = crowded;
    }
    return changed;
}

static bool wants_pause(const consumer *c, const struct assigned *a, int most_urgent)
{
    bool lower = a->lease->priority < most_urgent;
    return atomic_load(&c->w->stopping) || lease_revoked(a->lease) || a->crowded ||
           c->full[lower ? 1 : 0];
}

static void set_paused(consumer *c, rd_kafka_topic_partition_list_t *l, bool pause)
{
    if (!l->cnt)
        return;
    if (pause)
        rd_kafka_pause_partitions(c->rk, l);
    else
        rd_kafka_resume_partitions(c->rk, l);
    for (int i = 0; i < l->cnt; i++) {
        struct assigned *a = consumer_find(c, l->elems[i].topic, l->elems[i].partition);
        if (a && !l->elems[i].err)
            a->paused = pause;
    }
}

/* Tells the client; `all`: also what has not changed as far as we know. */
static void apply(consumer *c, const rd_kafka_topic_partition_list_t *only, bool all)
{
    rd_kafka_topic_partition_list_t *lists[2];
    int most = most_urgent(c);
    size_t paused = 0;
    atomic_store(&c->w->most_urgent, most);
    for (int i = 0; i < 2; i++)
        lists[i] = rd_kafka_topic_partition_list_new((int)c->n_parts);
    for (size_t i = 0; i < c->n_parts; i++) {
        const struct assigned *a = &c->parts[i];
        bool pause = wants_pause(c, a, most);
        paused += pause;
        if ((all || pause != a->paused) && consumer_selected(only, a))
            rd_kafka_topic_partition_list_add(lists[pause], a->lease->topic, a->partition);
    }
    if (lists[1]->cnt)
        metric_add(&c->w->metrics.pauses, 1);
    atomic_store(&c->w->metrics.paused, paused > 0);
    for (int i = 0; i < 2; i++) {
        set_paused(c, lists[i], i);
        rd_kafka_topic_partition_list_destroy(lists[i]);
    }
}

/* Once per spell: when the answer doesn't come, we pause. */
static void await_marks(consumer *c)
{
    if (!isolation_waiting(c)) {
        c->awaited = false;
    } else if (!c->awaited) {
        await_room(c, shares[1][1], MARK_WAIT_MS, true);
        c->awaited = isolation_waiting(c) && exceeds(c, shares[1][1]);
    }
}

void admission_control(consumer *c)
{
    bool changed = false;
    await_marks(c);
    for (int rank = CONSUMER_RANKS - 1; rank >= 0; rank--)
        changed |= update_rank(c, rank);
    changed |= update_crowded(c);
    if (changed || c->stopped != atomic_load(&c->w->stopping))
        admission_apply(c);
}

void admission_apply(consumer *c)
{
    c->stopped = atomic_load(&c->w->stopping);
    apply(c, NULL, false);
}

void admission_assigned(consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    apply(c, parts, true);
    apply(c, NULL, false);      /* a more urgent topic may have come */
}
