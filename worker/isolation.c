/* SPDX-License-Identifier: Apache-2.0 */
/*
 * isolation.c - the consumer thread's half of finding a poison prompt; quarantine.h has the
 * protocol, journal.h the half that one host does alone.
 *
 * Holding. A record at or beyond its partition's fence is delivered (it has its entry in the
 * ledger) but goes no further: it waits in the partition's `held` list until a commit with a higher
 * fence is acknowledged. In normal work that happens to the first records after an assignment, for
 * the time of one commit; the intake's budget counts them (admission.c).
 *
 * Turns. A suspect must run alone: of the whole process, not of its partition. At most one has the
 * turn:
 *
 *   OPEN      work as usual. A suspect that could run gets the turn
 *   CLOSING   intake starts nothing any more (w->closed); what is in the engine finishes
 *   MARKING   one commit: this suspect is alone, every other partition's owner is idle, so that
 *             the next death is about nobody else
 *   RUNNING   the suspect goes to intake. The turn ends once the engine has ended it, though its
 *             reply may wait long for its topic or the registry, or when it has to wait for
 *             something that can't be had now (its adapter, the registry): it comes back when it
 *             can run, as does one that the engine has failed and that is tried again
 *   OPENING   a commit says that the other partitions are at work again; then the engine is open
 *             for at least as long as it was closed
 *
 * A partition whose commits the group refuses (of a topic that we may not read any more, or that is
 * no more) can't have its mark, for as long as that lasts. Nobody waits for it: a death may count
 * for its prompts then, which were in no engine, and alone proves nothing (quarantine.h). Its own
 * suspects have no turn, until a commit is taken: one is tried at each interval. But if the group
 * has its mark already that a suspect is alone, and refuses the next one, the engine stays closed
 * until that is taken or the partition goes, for a minute: a death in company is not to count as
 * one alone. Then the others go on all the same, and the log says so: it would take two such deaths
 * to condemn that prompt.
 *
 * Keys. With delivery.order=key a suspect enters the order of its key when it is delivered, and has
 * no turn before it is the first of it; so what came later waits for it to be settled, as for any
 * other. What waits so counts as started (count_risk), for it will start without asking.
 *
 * In order. Before a partition is handed back, its idle mark is committed: nobody has died. Not
 * when the device has failed, nor when the engine makes no step: then what is in it stays suspect.
 *
 * Threads: the consumer thread's. w->closed and w->intake_rests are the handshake with intake.
 */
#include "worker/consumer_int.h"

#include <inttypes.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    PARTIAL_WAIT_US = 50000,    /* for what a suspect needs before the engine */
    RETRY_US = 200000,          /* after a commit of the partition that failed */
    STAGED_WAIT_US = 3000000,   /* exactly-once: for the transaction with the idle marks */
    LAST_WAIT_US = 2000000,     /* the same when the worker ends */
    STEP_WAIT_US = 1000000,     /* a step takes less, or the engine hangs */
    OVERDUE_US = 60000000,      /* refused for so long, the end of a turn is waited for no more */
    HELD_MAX = 1024,            /* of a quarantined partition: then it pauses */
};

/* ---- life ------------------------------------------------------------------------------- */

void isolation_init(consumer *c, size_t map_limit)
{
    const int64_t seed[] = { getpid(), lm_wall_ms(), lm_now_us() };
    c->iso.max = map_limit >= QUARANTINE_ROOM_MIN ? (int)c->w->cfg->poison_max_attempts : 0;
    c->iso.self = XXH32(seed, sizeof seed, 0);
    if (c->w->cfg->poison_max_attempts && !c->iso.max)
        lm_log(LM_INFO, "consumer", "without room in the commit metadata (commit.map_max_bytes, "
               "librdkafka 2.2) poison prompts are counted by each host for itself");
}

/* Bytes that the maps may have. */
size_t isolation_map_room(const consumer *c, size_t map_limit)
{
    bool marks = c->iso.max && map_limit >= QUARANTINE_ROOM_MIN;
    return marks ? map_limit - QUARANTINE_TEXT_MAX - 1 : map_limit;
}

static void say_death(const struct assigned *a)
{
    const struct quarantine *q = &a->q;
    static const char *const how[] = { "", "a few at a time", "one by one, alone in the engine" };
    lm_log(LM_WARN, "consumer", "%s [%d]: its owner went without handing it back (%d such in a "
           "row); what is unfinished below %" PRId64 " runs %s", a->lease->topic, (int)a->partition,
           q->deaths, q->until, how[quarantine_level(q)]);
}

bool isolation_adopt(consumer *c, struct assigned *a, const char *text, size_t len, int64_t base)
{
    struct quarantine_mark m;
    quarantine_init(&a->q, c->iso.max, c->iso.self);
    lm_status st = quarantine_parse(text, len, base, &m);
    if (st && st != LM_NOT_FOUND)
        lm_log(LM_WARN, "consumer", "%s [%d]: the mark in the commit metadata is ignored: %s",
               a->lease->topic, (int)a->partition,
               st == LM_MISMATCH ? "the group was moved" : "it is damaged");
    if (quarantine_adopt(&a->q, st ? NULL : &m, base))
        say_death(a);
    a->uncapped = a->q.deaths > 0;
    c->iso.active |= a->uncapped;
    return st != LM_NOT_FOUND;
}

/* ---- holding ---------------------------------------------------------------------------- */

/* It takes its place among its key's at once: later ones wait behind it until it is settled. */
static void hold_suspect(consumer *c, struct job *j)
{
    bool first = true;
    j->suspect = j->held = true;
    if (c->order && key_order_enter(c->order, j, &first))
        worker_fail(c->w, LM_NOMEM, "out of memory for the order of keys");
    j->behind = !first;
}

bool isolation_keeps(consumer *c, struct job *j)
{
    bool dropped = j->behind && !j->held && !atomic_load(&j->alone_now);
    j->behind = false;
    if (dropped)
        worker_end_job(c->w, j, OUTCOME_DROPPED);
    return j->held || dropped;
}

/* What the log does not reach nobody has started. */
static void cap_suspects(consumer *c, struct assigned *a, int64_t offset)
{
    int64_t low, high;
    a->uncapped = false;
    if (!rd_kafka_get_watermark_offsets(c->rk, a->lease->topic, a->partition, &low, &high) &&
        high > offset)
        a->q.until = LM_MIN(a->q.until, high);
}

bool isolation_hold(consumer *c, struct assigned *a, struct job *j)
{
    int64_t offset = j->record.offset;
    if (a->uncapped)
        cap_suspects(c, a, offset);
    if (a->q.deaths && offset < a->q.until) {
        j->pool_deaths = a->q.deaths;
        j->pool_alone = offset == a->q.suspect ? a->q.alone : 0;
        if (quarantine_condemns(&a->q, offset))
            return false;       /* intake refuses it, unseen */
        if (quarantine_suspects(&a->q, offset)) {
            hold_suspect(c, j);
            return true;
        }
    }
    if (!a->held.head && quarantine_may_start(&a->q, offset))
        return false;
    job_chain_add(&a->held, j);
    c->iso.active = true;
    if (a->held.length == HELD_MAX)
        c->next_crowded_us = 0; /* admission.c looks at once */
    return true;
}

/* Of a quarantined partition they wait for suspects, perhaps for long: these have a limit of their
 * own, so that the other partitions go on. */
int64_t isolation_waiting(const consumer *c)
{
    int64_t n = 0;
    for (size_t i = 0; c->iso.active && i < c->n_parts; i++)
        if (!c->parts[i].q.deaths)
            n += (int64_t)c->parts[i].held.length;
    return n;
}

bool isolation_crowded(const struct assigned *a, bool already)
{
    return a->q.deaths && a->held.length >= (already ? HELD_MAX / 2 : HELD_MAX);
}

static void release(consumer *c, struct assigned *a)
{
    while (a->held.head && quarantine_may_start(&a->q, a->held.head->record.offset))
        if (consumer_admit(c, job_chain_pop(&a->held)))
            worker_fail(c->w, LM_NOMEM, "out of memory for the order of keys");
}

struct cut { consumer *c; int64_t from; };

static void end_held(void *ctx, int64_t offset, void *user)
{
    const struct cut *cut = ctx;
    struct job *j = user;
    if (!j->held || offset < cut->from)
        return;
    j->held = false;
    if (!j->behind)             /* else it is in the order's list, until the one before it ends */
        worker_end_job(cut->c->w, j, OUTCOME_DROPPED);
}

/* Is the turn a suspect's of this partition? */
static bool has_turn(const consumer *c, const struct assigned *a)
{
    return c->iso.job && ledger_same(c->iso.ref, a->ref);
}

static void drop_held(consumer *c, struct assigned *a, int64_t from)
{
    struct cut cut = { c, from };
    struct job_chain all = a->held, gone = { 0 };
    ledger_each(c->ledger, a->ref, end_held, &cut);
    a->held = (struct job_chain){ 0 };
    while (all.head) {
        struct job *j = job_chain_pop(&all);
        job_chain_add(j->record.offset < from ? &a->held : &gone, j);
    }
    worker_drop_all(c->w, gone.head);
    if (has_turn(c, a) && c->iso.offset >= from)
        c->iso.turn = TURN_OPENING;
}

void isolation_cut(consumer *c, struct assigned *a, int64_t from)
{
    drop_held(c, a, from);
    quarantine_cut(&a->q, from);
}

void isolation_drop(consumer *c, struct assigned *a)
{
    drop_held(c, a, INT64_MIN);
    quarantine_init(&a->q, c->iso.max, c->iso.self);
    a->uncapped = false;
    a->retry_us = a->overdue_since_us = 0;
    a->overdue = false;
}

/* ---- marks ------------------------------------------------------------------------------ */

static bool turn_marked(const consumer *c)
{
    return c->iso.turn == TURN_MARKING || c->iso.turn == TURN_RUNNING;
}

static bool wants_idle(const consumer *c, const struct assigned *a)
{
    return a->leaving || (turn_marked(c) && !has_turn(c, a));
}

static bool wants_solo(const consumer *c, const struct assigned *a)
{
    return !a->leaving && turn_marked(c) && has_turn(c, a);
}

struct risk { size_t n; };

/* What may kill the engine now, or soon without asking: not what waits for a store. */
static void count_risk(void *ctx, int64_t offset, void *user)
{
    struct risk *r = ctx;
    const struct job *j = user;
    (void)offset;
    enum job_stage s = atomic_load(&j->stage);
    r->n += !j->suspect && (s == JOB_QUEUED || s == JOB_READY || s == JOB_RUNNING);
}

/* Up to where a quarantined partition may go on. */
static int64_t window_fence(consumer *c, const struct assigned *a)
{
    struct risk r = { 0 };
    int64_t fence = quarantine_fence(&a->q);
    if (!a->held.head)
        return fence;
    ledger_each(c->ledger, a->ref, count_risk, &r);
    r.n -= LM_MIN(r.n, a->held.length);
    for (const struct job *j = a->held.head; j && r.n < QUARANTINE_WINDOW; j = j->next, r.n++)
        fence = LM_MAX(fence, j->record.offset + 1);
    return fence;
}

static int64_t next_fence(consumer *c, struct assigned *a, const struct ledger_info *info)
{
    if (wants_idle(c, a))
        return quarantine_fence(&a->q);
    if (quarantine_level(&a->q) == QUARANTINE_FREE)
        return quarantine_reserve(&a->q, info->last_delivered);
    int64_t fence = window_fence(c, a);
    return wants_solo(c, a) ? LM_MAX(fence, c->iso.offset + 1) : fence;
}

bool isolation_wants(consumer *c, struct assigned *a)
{
    struct ledger_info info;
    const struct quarantine *q = &a->q;
    if (!c->iso.max || q->asking)
        return false;
    if (a->leaving)
        return !q->acked.idle;
    if (lease_revoked(a->lease) || atomic_load(&c->w->stopping) || lm_now_us() < a->retry_us ||
        !ledger_get(c->ledger, a->ref, &info))
        return false;
    if (wants_idle(c, a))
        return !q->acked.idle;
    if (wants_solo(c, a))
        return !q->acked.solo || q->acked.idle || q->acked.suspect != c->iso.offset;
    if (q->acked.solo)
        return true;
    if (q->acked.idle && c->iso.turn == TURN_OPENING && info.in_flight > a->held.length &&
        quarantine_fence(q) >= 0)
        return true;
    if (!a->held.head)
        return false;
    return q->acked.idle || quarantine_level(q) == QUARANTINE_FREE ||
           window_fence(c, a) > quarantine_fence(q);
}

bool isolation_probes(const consumer *c, const struct assigned *a)
{
    return c->iso.max && a->refused && !c->exactly_once && !lease_revoked(a->lease) &&
           quarantine_level(&a->q) == QUARANTINE_SOLO && lm_now_us() >= a->retry_us;
}

size_t isolation_text(consumer *c, struct assigned *a, const struct ledger_commit *due,
                      char out[QUARANTINE_TEXT_MAX + 1])
{
    struct ledger_info info;
    out[0] = 0;
    if (!c->iso.max || due->offset < 0 || !ledger_get(c->ledger, a->ref, &info))
        return 0;
    /* Nothing was started yet: who takes over next is told what we were. */
    bool idle = wants_idle(c, a) || (a->q.acked.fence < 0 && !info.in_flight);
    quarantine_ask(&a->q, next_fence(c, a, &info), idle, wants_solo(c, a));
    return quarantine_text(&a->q.asked, due->offset, out);
}

void isolation_unsent(consumer *c, struct ledger_ref ref)
{
    struct assigned *a = consumer_find_ref(c, ref);
    if (a)
        quarantine_answer(&a->q, false);
}

void isolation_answered(consumer *c, struct ledger_ref ref, bool accepted)
{
    struct assigned *a = consumer_find_ref(c, ref);
    if (!a)
        return;
    quarantine_answer(&a->q, accepted);
    a->retry_us = accepted ? 0 : lm_now_us() + RETRY_US;
}

static void set_free(void *ctx, int64_t offset, void *user)
{
    consumer *c = ctx;
    struct job *j = user;
    (void)offset;
    atomic_store(&j->alone_now, true);
    if (j->held && !j->behind)
        consumer_to_intake(c, j);
    j->held = false;
}

/* The broker leaves no room for marks: nothing is held any more. */
void isolation_end(consumer *c)
{
    c->iso.max = 0;
    for (size_t i = 0; i < c->n_parts; i++) {
        quarantine_init(&c->parts[i].q, 0, c->iso.self);
        release(c, &c->parts[i]);
        ledger_each(c->ledger, c->parts[i].ref, set_free, c);
    }
    atomic_store(&c->w->closed, false);
    job_unref(c->iso.job);
    c->iso.job = NULL;
    c->iso.turn = TURN_OPEN;
}

/* ---- turns ------------------------------------------------------------------------------ */

struct choice { const struct quarantine *q; struct job *job; };

static void choose(void *ctx, int64_t offset, void *user)
{
    struct choice *x = ctx;
    struct job *j = user;
    enum job_stage s = atomic_load(&j->stage);
    bool able = j->suspect && !j->behind && (s == JOB_QUEUED || s == JOB_READY);
    if (able && (!x->job || offset == x->q->suspect))
        x->job = j;
}

static bool begin_turn(consumer *c)
{
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        struct choice x = { &a->q, NULL };
        if (quarantine_level(&a->q) != QUARANTINE_SOLO || lease_revoked(a->lease) || a->refused)
            continue;
        ledger_each(c->ledger, a->ref, choose, &x);
        if (!x.job)
            continue;
        c->iso.job = job_ref(x.job);
        c->iso.ref = a->ref;
        c->iso.offset = x.job->record.offset;
        quarantine_single_out(&a->q, c->iso.offset);
        lm_log(LM_INFO, "consumer", "%s [%d] @%" PRId64 " runs alone: %d workers went while it "
               "ran", a->lease->topic, (int)a->partition, c->iso.offset, a->q.deaths);
        return true;
    }
    return false;
}

/* The group has it that a suspect is alone, and refuses to hear that it is no more. */
static void note_overdue(struct assigned *a, int64_t now)
{
    if (!a->overdue_since_us)
        a->overdue_since_us = now;
    if (a->overdue || now - a->overdue_since_us < OVERDUE_US)
        return;
    a->overdue = true;
    lm_log(LM_WARN, "consumer", "%s [%d] @%" PRId64 " ran alone, and for %d s the group has not "
           "taken that it does no more: others run again; until it takes a commit of the partition "
           "a death of this worker may count as one of that prompt alone (two make it a dead "
           "letter)", a->lease->topic, (int)a->partition, a->q.acked.suspect, OVERDUE_US / 1000000);
}

/* Does a turn wait for its mark? */
static bool is_needed(struct assigned *a, int64_t now)
{
    if (a->refused && a->q.acked.solo) {
        note_overdue(a, now);
        return !a->overdue;
    }
    a->overdue = false;
    a->overdue_since_us = 0;
    return !a->refused;
}

/* Has every partition that can have it the mark that this turn asks for? And none one too many. */
static bool all_marked(consumer *c)
{
    int64_t now = lm_now_us();
    bool all = true;
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        bool rests = now < a->retry_us;         /* till then it wants none */
        if (is_needed(a, now))
            all = all && !rests && !a->q.asking && !isolation_wants(c, a);
    }
    return all;
}

/* Can the suspect's own partition not have its mark? */
static bool turn_refused(const consumer *c)
{
    for (size_t i = 0; i < c->n_parts; i++)
        if (has_turn(c, &c->parts[i]))
            return c->parts[i].refused;
    return false;
}

static void start_suspect(consumer *c)
{
    struct job *j = c->iso.job;
    atomic_store(&j->alone_now, true);
    if (!j->held) {
        job_queue_wake(&c->w->to_intake);
        return;
    }
    j->held = false;
    consumer_to_intake(c, j);
}

/* Over, or waiting for what can't be had now? The engine has survived one that is ANSWERING, and a
 * death is not its any more. Once it has been told to wait it is asked again: it may have entered
 * the engine meanwhile, for the first time or as one that was sent back. */
static bool turn_over(consumer *c, int64_t now)
{
    struct job *j = c->iso.job;
    enum job_stage s = atomic_load(&j->stage);
    if (s == JOB_ENDED || s == JOB_DROPPED)
        return true;
    if (s == JOB_RUNNING)
        return false;
    if (!atomic_load(&j->alone_now))
        return !atomic_load(&c->w->in_engine);
    if (s == JOB_ANSWERING || now - c->iso.since_us > PARTIAL_WAIT_US)
        atomic_store(&j->alone_now, false);
    return false;
}

static void close_engine(consumer *c, int64_t now)
{
    atomic_store(&c->w->intake_rests, false);
    atomic_store(&c->w->closed, true);
    job_queue_wake(&c->w->to_intake);
    c->iso.turn = TURN_CLOSING;
    c->iso.closed_us = now;
}

static void open_engine(consumer *c, int64_t now)
{
    atomic_store(&c->w->closed, false);
    job_queue_wake(&c->w->to_intake);
    job_unref(c->iso.job);
    c->iso.job = NULL;
    c->iso.turn = TURN_OPEN;
    c->iso.next_us = now + LM_MIN(now - c->iso.closed_us, now - c->iso.since_us);
}

static void take_turns(consumer *c, int64_t now)
{
    switch (c->iso.turn) {
    case TURN_OPEN:
        if (now >= c->iso.next_us && !atomic_load(&c->w->stopping) && begin_turn(c))
            close_engine(c, now);
        break;
    case TURN_CLOSING:
        if (atomic_load(&c->w->intake_rests) && !atomic_load(&c->w->in_engine))
            c->iso.turn = TURN_MARKING;
        break;
    case TURN_MARKING:
        if (turn_refused(c)) {
            c->iso.since_us = now;
            c->iso.turn = TURN_OPENING;
        } else if (all_marked(c)) {
            c->iso.turn = TURN_RUNNING;
            c->iso.since_us = now;
            start_suspect(c);
        }
        break;
    case TURN_RUNNING:
        if (turn_over(c, now))
            c->iso.turn = TURN_OPENING;
        break;
    case TURN_OPENING:
        if (all_marked(c))
            open_engine(c, now);
    }
}

static void serve_part(consumer *c, struct assigned *a)
{
    struct ledger_info info;
    if (a->q.deaths && ledger_get(c->ledger, a->ref, &info))
        quarantine_progress(&a->q, info.watermark);
    if (a->held.head && !lease_revoked(a->lease))
        release(c, a);
    c->iso.active |= a->held.head || a->q.deaths;
    c->iso.busy |= a->held.head || quarantine_level(&a->q) == QUARANTINE_SOLO;
    c->iso.wanted |= isolation_wants(c, a) && !(a->refused && c->exactly_once);
}

void isolation_serve(consumer *c)
{
    c->iso.wanted = false;
    c->iso.busy = c->iso.turn != TURN_OPEN;
    if (!c->iso.max || (!c->iso.active && !c->iso.busy))
        return;                 /* as nearly always */
    c->iso.active = false;
    take_turns(c, lm_now_us());
    for (size_t i = 0; i < c->n_parts; i++)
        serve_part(c, &c->parts[i]);
    if (c->iso.wanted && c->exactly_once)
        producer_want_offsets(c->w->producer);
}

/* ---- in order --------------------------------------------------------------------------- */

static uint64_t engine_steps(const consumer *c, bool *busy)
{
    struct engine_stats s;
    engine_stats(c->w->engine, &s);
    *busy = s.running > 0;
    return s.steps;
}

void isolation_before_leaving(consumer *c)
{
    bool busy;
    c->iso.leave_us = lm_now_us();
    c->iso.leave_begun = false;
    if (c->iso.max)
        c->iso.steps = engine_steps(c, &busy);
}

/* Does the engine hold on to something of these partitions and make no step? */
static bool seems_hung(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    bool busy;
    while (rebalance_active(c, only, false) && engine_steps(c, &busy) == c->iso.steps && busy) {
        if (lm_now_us() - c->iso.leave_us > STEP_WAIT_US)
            return true;
        consumer_take_finished(c, DRAIN_POLL_MS);
        staging_serve(c);
    }
    return false;
}

static void begin_leaving(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    int64_t now = lm_now_us(), end = now + STAGED_WAIT_US;
    c->iso.leave_begun = true;
    if (atomic_load(&c->w->stopping))   /* the drain's end is the clock of all */
        end = LM_MIN(end, LM_MAX(now, atomic_load(&c->w->drain_end_us)) + LAST_WAIT_US);
    c->iso.leave_end_us = end;
    bool hung = seems_hung(c, only);    /* then what is in it stays suspect */
    for (size_t i = 0; !hung && i < c->n_parts; i++)
        if (consumer_selected(only, &c->parts[i]))
            c->parts[i].leaving = true;
}

bool isolation_left(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    if (!c->iso.max || c->staging.closed || atomic_load(&c->w->failed) == LM_DEVICE)
        return true;
    if (!c->iso.leave_begun)
        begin_leaving(c, only);
    if (!c->exactly_once || lm_now_us() >= c->iso.leave_end_us)
        return true;            /* at-least-once: the last commit says it */
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        if (a->leaving && !a->refused && consumer_selected(only, a) &&
            (a->q.asking || isolation_wants(c, a))) {
            producer_want_offsets(c->w->producer);
            return false;
        }
    }
    return true;
}

void isolation_leave(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    while (!isolation_left(c, only)) {
        atomic_store(&c->w->consumer_beat_us, lm_now_us());
        consumer_take_finished(c, DRAIN_POLL_MS);
        staging_serve(c);
    }
}
