/* SPDX-License-Identifier: Apache-2.0 */
/*
 * batch_job.c - see batch_job.h.
 *
 * Life of a line
 *
 *   read --bad--> error line
 *     |
 *     +-- adapter asked for --> FETCHING --failed--> error line
 *     |                         |  ^   |
 *     |                         |  |   +-- no host memory free --> CROWDED --+
 *     |                         |  +-------------------- asked again --------+
 *     +-----------------------> READY --submit refused--> error line
 *                               |   ^-- engine busy: stays
 *                               RUNNING --> result line or error line
 *
 * The adapters of all lines in flight may be more than host memory is granted for. A line whose
 * adapter found no room holds none itself, so those that do will end and make room: crowded lines
 * are asked for again, one at a time, as long as that goes well.
 *
 * The caller's thread moves every line; store threads only put a line that has its adapter (or its
 * failure) on the ready list, under the one lock, and wake the poll.
 */
#include "worker/tools/batch_job.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "worker/tools/batch_output.h"
#include "worker/tools/openai.h"
#include "worker/tools/progress.h"

enum { MAX_LINE = 64 << 20, POLL_MS = 100, POLL_EVENTS = 64 };

struct item {
    struct item *next;          /* in `arrived`, `ready` or `crowded` */
    struct item *prev_live, *next_live;
    struct batch *batch;
    uint64_t line;
    struct openai_request *request;
    engine_adapter *adapter;
    struct lm_err err;          /* why it has no adapter */
};

struct list { struct item *head, **tail; };

struct batch {
    const struct batch_config *cfg;
    struct engine_info info;
    FILE *in;
    char *buf;
    size_t cap;
    bool eof, regular;          /* regular: the input can be read twice */
    uint64_t line;
    batch_output *out;
    struct batch_totals *totals;
    progress *bar;
    int in_flight;
    struct item *live;          /* every item that has not ended */
    pthread_mutex_t lock;       /* guards `arrived` */
    struct list arrived;        /* adapters have come (or failed), from store threads */
    struct list ready;          /* to be submitted, in order */
    struct list crowded;        /* adapters found no room in host memory */
    int n_crowded;
    struct item *asking;        /* was crowded, is asked for again */
    bool room;                  /* something ended, or got its adapter, since the last refusal */
};

/* ---- lists ----------------------------------------------------------------------------- */

static void list_init(struct list *l)
{
    l->head = NULL;
    l->tail = &l->head;
}

static void list_add(struct list *l, struct item *it)
{
    it->next = NULL;
    *l->tail = it;
    l->tail = &it->next;
}

static struct item *list_take(struct list *l)
{
    struct item *it = l->head;
    if (it && !(l->head = it->next))
        l->tail = &l->head;
    return it;
}

static struct item *item_new(struct batch *b)
{
    struct item *it = lm_calloc(1, sizeof *it);
    if (!it)
        return NULL;
    it->batch = b;
    it->line = b->line;
    it->next_live = b->live;
    if (b->live)
        b->live->prev_live = it;
    b->live = it;
    b->in_flight++;
    return it;
}

static void item_free(struct item *it)
{
    *(it->prev_live ? &it->prev_live->next_live : &it->batch->live) = it->next_live;
    if (it->next_live)
        it->next_live->prev_live = it->prev_live;
    it->batch->in_flight--;
    it->batch->room = true;
    engine_adapter_unref(it->adapter);
    openai_request_free(it->request);
    free(it);
}

/* ---- endings --------------------------------------------------------------------------- */

static void show(struct batch *b)
{
    const struct batch_totals *t = b->totals;
    progress_set(b->bar, t->skipped + t->answered + t->refused);
    if (t->refused)
        progress_note(b->bar, "%" PRIu64 " refused", t->refused);
}

static lm_status end_refused(struct batch *b, struct item *it, const struct lm_err *why,
                             struct lm_err *err)
{
    char id[BATCH_ID_CHARS];
    batch_id(id, it->line);
    const char *custom_id = it->request ? it->request->custom_id : NULL;
    lm_status st = batch_output_write(b->out, openai_error_line(id, custom_id, why), err);
    b->totals->refused++;
    item_free(it);
    show(b);
    return st;
}

static lm_status end_answered(struct batch *b, struct item *it, const struct engine_result *r,
                              struct lm_err *err)
{
    char id[BATCH_ID_CHARS];
    batch_id(id, it->line);
    const char *digest = it->adapter ? engine_adapter_digest(it->adapter) : NULL;
    lm_status st = batch_output_write(b->out, openai_result_line(id, it->request, digest, r), err);
    b->totals->answered++;
    b->totals->prompt_tokens += (uint64_t)r->prompt_tokens;
    b->totals->completion_tokens += (uint64_t)r->completion_tokens;
    item_free(it);
    show(b);
    return st;
}

/* ---- reading --------------------------------------------------------------------------- */

/* On a store thread, or inside store_get(). */
static void adapter_arrived(void *user, lm_status status, engine_adapter *a,
                            const struct lm_err *why)
{
    struct item *it = user;
    struct batch *b = it->batch;
    it->adapter = a;
    if (status != LM_OK) {
        it->err = why ? *why : (struct lm_err){ .code = status };
        it->err.code = status;
    }
    pthread_mutex_lock(&b->lock);
    list_add(&b->arrived, it);
    pthread_mutex_unlock(&b->lock);
    engine_wake(b->cfg->engine);
}

static bool is_blank(const char *s, size_t n)
{
    return strspn(s, " \t\r\n") >= n;
}

static lm_status take_line(struct batch *b, size_t len, struct lm_err *err)
{
    struct item *it = item_new(b);
    if (!it)
        return lm_err_set(err, LM_NOMEM, "no memory for line %" PRIu64, b->line);
    struct lm_err why = { 0 };
    lm_status st = len > MAX_LINE
        ? lm_err_set(&why, LM_TOO_LARGE, "the line has %zu bytes, more than %d", len, MAX_LINE)
        : openai_parse(b->buf, len, b->info.model_name, &it->request, &why);
    if (!st && it->request->adapter && !b->cfg->adapters)
        st = lm_err_set(&why, LM_NOT_FOUND, "body.model \"%.256s\" is not the base model "
                        "\"%.128s\", and no --adapters are given", it->request->adapter,
                        b->info.model_name);
    if (st)
        return end_refused(b, it, &why, err);
    if (it->request->adapter)
        store_get(b->cfg->store, it->request->adapter, adapter_arrived, it);
    else
        list_add(&b->ready, it);
    return LM_OK;
}

/* The line has its result: of the same request? */
static lm_status skip_line(struct batch *b, size_t len, struct lm_err *err)
{
    struct openai_request *q = NULL;
    struct lm_err why;
    if (len <= MAX_LINE)
        openai_parse(b->buf, len, b->info.model_name, &q, &why);
    bool same = batch_output_is_of(b->out, b->line, q ? q->custom_id : NULL);
    openai_request_free(q);
    if (!same)
        return lm_err_set(err, LM_STATE, "input %s, line %" PRIu64 ": %s holds another request's "
                          "result; --resume goes on with the input that the job began with",
                          b->cfg->input, b->line, b->cfg->output);
    b->totals->skipped++;
    show(b);
    return LM_OK;
}

/* Some editors begin a file with a byte order mark; it is no part of the first line. */
static ssize_t drop_bom(char *line, ssize_t n)
{
    if (n < 3 || memcmp(line, "\xef\xbb\xbf", 3))
        return n;
    memmove(line, line + 3, (size_t)n - 2);     /* with the NUL */
    return n - 3;
}

/* Reads lines until enough are in flight. */
static lm_status fill(struct batch *b, struct lm_err *err)
{
    lm_status st = LM_OK;
    while (!st && !b->eof && b->in_flight < b->cfg->max_in_flight) {
        errno = 0;
        ssize_t n = getline(&b->buf, &b->cap, b->in);
        if (n < 0) {
            b->eof = true;
            if (ferror(b->in) || !feof(b->in))      /* neither: no memory for the line */
                return lm_err_set(err, LM_IO, "input %s: %s", b->cfg->input, strerror(errno));
            return LM_OK;
        }
        if (b->line++ == 0)
            n = drop_bom(b->buf, n);
        while (n > 0 && (b->buf[n - 1] == '\n' || b->buf[n - 1] == '\r'))
            n--;
        if (is_blank(b->buf, (size_t)n))
            continue;
        b->totals->lines++;
        st = batch_output_has(b->out, b->line) ? skip_line(b, (size_t)n, err)
                                               : take_line(b, (size_t)n, err);
    }
    return st;
}

/* ---- submitting and polling ------------------------------------------------------------ */

static void sort_arrived(struct batch *b, struct item *it)
{
    bool crowded = it->err.code == LM_BUSY;
    if (it == b->asking)
        b->asking = NULL;
    if (crowded)
        it->err = (struct lm_err){ 0 };
    b->n_crowded += crowded;
    b->room = !crowded;
    list_add(crowded ? &b->crowded : &b->ready, it);
}

static void collect_arrived(struct batch *b)
{
    pthread_mutex_lock(&b->lock);
    for (struct item *it; (it = list_take(&b->arrived));)
        sort_arrived(b, it);
    pthread_mutex_unlock(&b->lock);
}

/* When only crowded lines are left, nothing holds an adapter any more. */
static void ask_again(struct batch *b)
{
    if (b->asking || !b->crowded.head || (!b->room && b->in_flight > b->n_crowded))
        return;
    b->asking = list_take(&b->crowded);
    b->n_crowded--;
    store_get(b->cfg->store, b->asking->request->adapter, adapter_arrived, b->asking);
}

static lm_status submit_item(struct batch *b, struct item *it, struct lm_err *why)
{
    const struct openai_request *q = it->request;
    char id[BATCH_ID_CHARS];
    batch_id(id, it->line);
    const struct engine_request r = {
        .id = id, .adapter = it->adapter, .prompt = q->prompt, .prompt_len = q->prompt_len,
        .token_ids = q->token_ids, .n_token_ids = q->n_token_ids, .messages = q->messages,
        .n_messages = q->n_messages, .params = q->params, .user = it,
    };
    engine_handle h;
    return engine_submit(b->cfg->engine, &r, &h, why);
}

static lm_status submit_ready(struct batch *b, struct lm_err *err)
{
    lm_status st = LM_OK;
    while (!st && b->ready.head) {
        struct item *it = b->ready.head;
        struct lm_err why = it->err;
        lm_status s = why.code ? why.code : submit_item(b, it, &why);
        if (s == LM_BUSY)
            break;
        list_take(&b->ready);
        if (s)
            st = end_refused(b, it, &why, err);
    }
    return st;
}

static lm_status end_event(struct batch *b, struct engine_event *ev, struct lm_err *err)
{
    struct engine_result *r = ev->result;
    lm_status st;
    if (r->status != LM_OK) {
        struct lm_err why;
        lm_err_set(&why, r->status, "%s", r->error);
        st = end_refused(b, ev->user, &why, err);
    } else {
        st = end_answered(b, ev->user, r, err);
    }
    engine_result_free(r);
    return st;
}

static lm_status poll_engine(struct batch *b, struct lm_err *err)
{
    struct engine_event ev[POLL_EVENTS];
    lm_status state = LM_OK, st = LM_OK;
    int n = engine_poll(b->cfg->engine, ev, POLL_EVENTS, POLL_MS, &state);
    for (int i = 0; i < n; i++) {
        if (ev[i].kind != ENGINE_FINISHED) {
            free(ev[i].text);
        } else if (!st && state == LM_OK) {
            st = end_event(b, &ev[i], err);
        } else {                /* not written: a resumed run does it again */
            engine_result_free(ev[i].result);
            item_free(ev[i].user);
        }
    }
    if (!st && state != LM_OK)
        st = lm_err_set(err, state, "the engine stopped (%s); run again with --resume",
                        lm_status_text(state));
    return st;
}

static lm_status run(struct batch *b, struct lm_err *err)
{
    lm_status st = LM_OK;
    while (!st && (!b->eof || b->in_flight > 0)) {
        if (atomic_load(b->cfg->stop))
            return lm_err_set(err, LM_CANCELLED, "stopped; run again with --resume to go on");
        st = fill(b, err);
        if (!st) {
            collect_arrived(b);
            ask_again(b);
            st = submit_ready(b, err);
        }
        if (!st && b->in_flight > 0)
            st = poll_engine(b, err);
    }
    return st;
}

/* ---- set-up ---------------------------------------------------------------------------- */

static lm_status open_input(struct batch *b, struct lm_err *err)
{
    const struct batch_config *c = b->cfg;
    struct stat in, out;
    b->in = strcmp(c->input, "-") ? fopen(c->input, "re") : stdin;
    if (!b->in)
        return lm_err_set(err, LM_NOT_FOUND, "input %s: %s", c->input, strerror(errno));
    if (fstat(fileno(b->in), &in))
        return lm_err_set(err, LM_IO, "input %s: %s", c->input, strerror(errno));
    if (S_ISDIR(in.st_mode))
        return lm_err_set(err, LM_INVALID, "input %s: is a folder", c->input);
    b->regular = S_ISREG(in.st_mode);
    if (b->regular && !stat(c->output, &out) && in.st_dev == out.st_dev && in.st_ino == out.st_ino)
        return lm_err_set(err, LM_INVALID, "input and output are the same file, %s", c->output);
    return LM_OK;
}

/* Counts lines for the bar, 0 where that would take them from the job: a pipe, standard input. */
static uint64_t count_lines(const struct batch *b)
{
    FILE *f = b->regular && b->in != stdin ? fopen(b->cfg->input, "re") : NULL;
    char *line = NULL;
    size_t cap = 0;
    uint64_t n = 0;
    if (!f)
        return 0;
    for (ssize_t len; (len = getline(&line, &cap, f)) >= 0;)
        n += !is_blank(line, (size_t)len);
    free(line);
    fclose(f);
    return n;
}

/* Lets go of what has not ended. The engine may still be working on it, but only hands `user` back
 * in events, and nobody polls them any more. */
static void abandon(struct batch *b)
{
    store_free(b->cfg->store);  /* every pending adapter_arrived() has been called after this */
    while (b->live)
        item_free(b->live);
}

lm_status batch_job_run(const struct batch_config *cfg, struct batch_totals *out,
                        struct lm_err *err)
{
    struct batch b = { .cfg = cfg, .totals = out };
    memset(out, 0, sizeof *out);
    engine_info(cfg->engine, &b.info);
    list_init(&b.arrived);
    list_init(&b.ready);
    list_init(&b.crowded);
    pthread_mutex_init(&b.lock, NULL);
    int64_t start = lm_now_us();
    lm_status st = open_input(&b, err);
    if (!st)
        st = batch_output_open(cfg->output, cfg->resume, &b.out, err);
    if (!st) {
        b.bar = progress_new(&(struct progress_config){
            .label = "batch", .unit = "requests", .total = count_lines(&b) });
        st = run(&b, err);
        abandon(&b);
        if (!st)
            progress_finish(b.bar);
        progress_free(b.bar);
        lm_status closed = batch_output_close(b.out, st ? NULL : err);
        st = st ? st : closed;
    } else {
        store_free(cfg->store);
    }
    out->seconds = (double)(lm_now_us() - start) / 1e6;
    if (b.in && b.in != stdin)
        fclose(b.in);
    free(b.buf);
    pthread_mutex_destroy(&b.lock);
    return st;
}
