/* SPDX-License-Identifier: Apache-2.0 */
/*
 * progress.c - the progress bar; see progress.h.
 *
 * One line is composed in memory and written with one call, so that a bar never tears when other
 * text goes to the same terminal. A bar is erased with "\r" and "clear to end of line" before
 * anything else is printed, and drawn again afterwards.
 *
 * The rate is an exponentially weighted mean of the increments, with a time constant of a few
 * seconds: long enough to be read, short enough that the ETA follows when a worker joins. Until one
 * time constant has passed it is the mean since the start.
 */
#include "worker/tools/progress.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BAR_EVERY_US 100000
#define LINE_EVERY_US 5000000
#define SMOOTH_US 4000000.0
#define BAR_CELLS_MAX 30
#define COLUMNS_MIN 40
#define COLUMNS_MAX 120

struct progress {
    FILE *out;
    const char *label, *unit;
    enum progress_style style;  /* never AUTO */
    int columns;                /* 0: ask the terminal each time */
    int64_t (*now_us)(void);
    uint64_t total, done;
    int64_t started, drawn;     /* drawn: when the line was last written */
    int64_t sampled;            /* when the rate last moved, and at which count */
    uint64_t sampled_done;
    double rate;                /* per second, smoothed */
    bool on_screen;             /* a bar stands on the current line */
    bool finished;
    char note[128];
};

/* ---- small formats ---------------------------------------------------------------------- */

char *progress_count(char buf[32], uint64_t n)
{
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n);
    char *to = buf;
    for (int i = 0; i < len; i++) {
        if (i > 0 && (len - i) % 3 == 0)
            *to++ = ',';
        *to++ = digits[i];
    }
    *to = '\0';
    return buf;
}

char *progress_clock(char buf[32], double seconds)
{
    if (!(seconds >= 0) || seconds > 99 * 3600.0) {
        snprintf(buf, 32, "-:--");
        return buf;
    }
    long s = lround(seconds);
    if (s >= 3600)
        snprintf(buf, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(buf, 32, "%ld:%02ld", s / 60, s % 60);
    return buf;
}

/* Three significant digits below 100, whole numbers with separators above. */
static char *format_rate(char buf[32], double rate)
{
    if (rate >= 100)
        return progress_count(buf, (uint64_t)llround(rate));
    snprintf(buf, 32, "%.*f", rate >= 10 ? 1 : 2, rate);
    return buf;
}

/* ---- life ------------------------------------------------------------------------------- */

static enum progress_style choose_style(enum progress_style wanted, FILE *out)
{
    if (wanted != PROGRESS_AUTO)
        return wanted;
    return isatty(fileno(out)) ? PROGRESS_BAR : PROGRESS_LINES;
}

progress *progress_new(const struct progress_config *cfg)
{
    progress *p = lm_calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->out = cfg->out ? cfg->out : stderr;
    p->label = cfg->label ? cfg->label : "";
    p->unit = cfg->unit ? cfg->unit : "";
    p->style = choose_style(cfg->style, p->out);
    p->columns = cfg->columns;
    p->now_us = cfg->now_us ? cfg->now_us : lm_now_us;
    p->total = cfg->total;
    p->started = p->drawn = p->sampled = p->now_us();
    return p;
}

static void erase(progress *p)
{
    if (!p->on_screen)
        return;
    fputs("\r\033[K", p->out);
    p->on_screen = false;
}

void progress_free(progress *p)
{
    if (!p)
        return;
    erase(p);
    fflush(p->out);
    free(p);
}

/* ---- drawing ---------------------------------------------------------------------------- */

static int width(const progress *p)
{
    struct winsize ws;
    int columns = p->columns;
    if (columns == 0 && ioctl(fileno(p->out), TIOCGWINSZ, &ws) == 0)
        columns = ws.ws_col;
    if (columns == 0)
        columns = 80;
    return LM_MIN(LM_MAX(columns, COLUMNS_MIN), COLUMNS_MAX);
}

static void sample(progress *p, int64_t now)
{
    double dt = (double)(now - p->sampled);
    if (dt <= 0)
        return;
    double age = (double)(now - p->started);
    double increment = p->done > p->sampled_done ? (double)(p->done - p->sampled_done) : 0;
    double weight = age < SMOOTH_US ? dt / age : 1 - exp(-dt / SMOOTH_US);
    p->rate += (increment * 1e6 / dt - p->rate) * weight;
    p->sampled = now;
    p->sampled_done = p->done;
}

/* The part after the bar: "512/1,000   51%  134 prompts/s  ETA 0:04  note". */
static void format_figures(const progress *p, int64_t now, char *buf, size_t size)
{
    char done[32], total[32], rate[32], clock[32], head[96], eta[48] = "";
    double age = (double)(now - p->started) / 1e6;
    double per_second = p->finished ? (age > 0 ? (double)p->done / age : 0) : p->rate;
    progress_count(done, p->done);
    if (p->total > 0) {
        int percent = (int)((double)LM_MIN(p->done, p->total) * 100 / (double)p->total);
        snprintf(head, sizeof head, "%s/%s  %3d%%", done, progress_count(total, p->total), percent);
    } else {
        snprintf(head, sizeof head, "%s", done);
    }
    if (p->finished || p->total == 0) {
        snprintf(eta, sizeof eta, "  in %s", progress_clock(clock, age));
    } else if (p->done < p->total) {
        bool told = p->rate > 0 && p->done * 100 >= p->total;   /* less tells nothing */
        snprintf(eta, sizeof eta, "  ETA %s",
                 progress_clock(clock, told ? (double)(p->total - p->done) / p->rate : -1));
    }
    snprintf(buf, size, "%s  %s %s/s%s%s%s", head, format_rate(rate, per_second), p->unit, eta,
             p->note[0] ? "  " : "", p->note);
}

static void format_bar(const progress *p, int cells, char *buf)
{
    int full = (int)((double)LM_MIN(p->done, p->total) * cells / (double)p->total);
    buf[0] = '[';
    memset(buf + 1, '#', (size_t)full);
    memset(buf + 1 + full, '-', (size_t)(cells - full));
    memcpy(buf + 1 + cells, "]  ", sizeof "]  ");
}

static void draw(progress *p, int64_t now)
{
    char figures[320], bar[BAR_CELLS_MAX + 8] = "", line[512];
    format_figures(p, now, figures, sizeof figures);
    if (p->style == PROGRESS_BAR) {
        /* One column stays free: writing into the last one makes some terminals wrap. */
        int columns = width(p) - 1;
        int cells = columns - (int)strlen(p->label) - (int)strlen(figures) - 6;
        if (p->total > 0 && cells >= 5)
            format_bar(p, LM_MIN(cells, BAR_CELLS_MAX), bar);
        snprintf(line, sizeof line, "%s  %s%s", p->label, bar, figures);
        if ((int)strlen(line) > columns)
            line[columns] = '\0';
        fprintf(p->out, "\r%s\033[K", line);
        p->on_screen = true;
    } else {
        fprintf(p->out, "%s  %s\n", p->label, figures);
    }
    fflush(p->out);
    p->drawn = now;
}

/* ---- what callers do -------------------------------------------------------------------- */

static void tick(progress *p)
{
    int64_t now = p->now_us();
    if (p->style == PROGRESS_SILENT || p->finished)
        return;
    if (now - p->sampled >= BAR_EVERY_US)
        sample(p, now);
    if (now - p->drawn >= (p->style == PROGRESS_BAR ? BAR_EVERY_US : LINE_EVERY_US))
        draw(p, now);
}

void progress_set(progress *p, uint64_t done)
{
    if (!p)
        return;
    p->done = done;
    tick(p);
}

void progress_note(progress *p, const char *fmt, ...)
{
    if (!p)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(p->note, sizeof p->note, fmt, ap);
    va_end(ap);
}

void progress_say(progress *p, const char *fmt, ...)
{
    FILE *out = p ? p->out : stderr;
    bool redraw = p && p->on_screen;
    if (p)
        erase(p);
    va_list ap;
    va_start(ap, fmt);
    vfprintf(out, fmt, ap);
    va_end(ap);
    fputc('\n', out);
    if (redraw)
        draw(p, p->now_us());
    fflush(out);
}

void progress_finish(progress *p)
{
    if (!p || p->finished)
        return;
    p->finished = true;
    if (p->style == PROGRESS_SILENT)
        return;
    draw(p, p->now_us());
    if (p->on_screen)
        fputc('\n', p->out);
    p->on_screen = false;
    fflush(p->out);
}
