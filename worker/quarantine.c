/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quarantine.c - see quarantine.h for the protocol.
 *
 * Between asking and the answer two marks may be the committed one, so the stricter of both holds:
 * a prompt may start if both allow it. A commit that failed may still have been applied; so its
 * fence goes on to bind, until another is accepted.
 */
#include "worker/quarantine.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

static const char prefix[] = "lq1:";
enum { PREFIX = sizeof prefix - 1, FIELDS = 8, IDLE = 1, SOLO = 2, COUNT_MAX = 1000 };

void quarantine_init(struct quarantine *q, int max, uint32_t self)
{
    *q = (struct quarantine){
        .max = max, .self = self, .until = -1, .suspect = -1, .reserved_at = -1,
        .acked = { .fence = -1, .until = -1, .suspect = -1, .idle = true },
    };
}

/* ---- the count -------------------------------------------------------------------------- */

bool quarantine_adopt(struct quarantine *q, const struct quarantine_mark *m, int64_t base)
{
    if (!q->max || !m)
        return false;
    bool linked = m->deaths > 0 && base < m->until;
    bool died = !m->idle && m->owner != q->self && m->fence > base;
    if (linked) {
        q->deaths = m->deaths;
        q->until = m->until;
        q->suspect = m->suspect;
        q->alone = m->alone;
    }
    if (!died)
        return false;
    q->until = linked ? LM_MIN(m->until, m->fence) : m->fence;
    q->deaths = LM_MIN(q->deaths + 1, COUNT_MAX);
    q->alone = LM_MIN(q->alone + (linked && m->solo), COUNT_MAX);
    return true;
}

void quarantine_progress(struct quarantine *q, int64_t watermark)
{
    if (!q->deaths)
        return;
    if (watermark > q->suspect)
        q->suspect = -1;
    if (q->suspect < 0)
        q->alone = 0;
    if (watermark < q->until)
        return;
    q->deaths = q->alone = 0;
    q->until = q->suspect = -1;
}

void quarantine_cut(struct quarantine *q, int64_t from)
{
    q->until = LM_MIN(q->until, from);
    if (q->suspect >= from) {
        q->suspect = -1;
        q->alone = 0;
    }
}

enum quarantine_level quarantine_level(const struct quarantine *q)
{
    if (!q->deaths)
        return QUARANTINE_FREE;
    return q->deaths < q->max - 1 ? QUARANTINE_BY_WINDOW : QUARANTINE_SOLO;
}

bool quarantine_suspects(const struct quarantine *q, int64_t offset)
{
    return offset < q->until && quarantine_level(q) == QUARANTINE_SOLO;
}

bool quarantine_condemns(const struct quarantine *q, int64_t offset)
{
    return q->deaths && q->deaths >= q->max && q->alone >= 2 && offset == q->suspect;
}

void quarantine_single_out(struct quarantine *q, int64_t offset)
{
    if (offset == q->suspect)
        return;
    q->suspect = offset;
    q->alone = 0;
}

/* ---- the fence -------------------------------------------------------------------------- */

int64_t quarantine_fence(const struct quarantine *q)
{
    return q->asking ? LM_MIN(q->acked.fence, q->asked.fence) : q->acked.fence;
}

bool quarantine_may_start(const struct quarantine *q, int64_t offset)
{
    return !q->max || (offset < quarantine_fence(q) && !q->acked.idle &&
                       !(q->asking && q->asked.idle));
}

int64_t quarantine_reserve(struct quarantine *q, int64_t last_delivered)
{
    int64_t moved = q->reserved_at < 0 ? 0 : last_delivered - q->reserved_at;
    int64_t ahead = LM_MAX(LM_MIN(moved, QUARANTINE_RESERVE_MAX / 4) * 4, QUARANTINE_RESERVE_MIN);
    q->reserved_at = last_delivered;
    return LM_MIN(last_delivered, INT64_MAX - ahead - 1) + ahead + 1;
}

void quarantine_ask(struct quarantine *q, int64_t fence, bool idle, bool solo)
{
    q->asked = (struct quarantine_mark){
        .fence = fence, .until = q->until, .suspect = q->suspect, .owner = q->self,
        .deaths = q->deaths, .alone = q->alone, .idle = idle, .solo = solo,
    };
    q->asking = true;
}

void quarantine_answer(struct quarantine *q, bool accepted)
{
    if (!q->asking)
        return;
    q->asking = false;
    if (accepted)
        q->acked = q->asked;
    else
        q->acked.fence = LM_MIN(q->acked.fence, q->asked.fence);
}

/* ---- text ------------------------------------------------------------------------------- */

size_t quarantine_text(const struct quarantine_mark *m, int64_t base,
                       char out[QUARANTINE_TEXT_MAX + 1])
{
    bool suspects = m->deaths && m->until > base;
    bool named = suspects && m->suspect >= base;
    out[0] = 0;
    if (base < 0 || (m->idle && !suspects))
        return 0;
    int n = snprintf(out, QUARANTINE_TEXT_MAX, "%s%" PRIx64 ".%" PRIx64 ".%" PRIx64 ".%" PRIx64
                     ".%x.%x.%" PRIx32 ".%x", prefix, base, LM_MAX(m->fence, base) - base,
                     suspects ? m->until - base : 0, named ? m->suspect - base + 1 : 0,
                     (unsigned)(suspects ? m->deaths : 0), (unsigned)(named ? m->alone : 0),
                     m->owner, (unsigned)((m->idle ? IDLE : 0) | (m->solo ? SOLO : 0)));
    n += snprintf(out + n, (size_t)(QUARANTINE_TEXT_MAX + 1 - n), ".%08" PRIx32,
                  XXH32(out, (size_t)n, 0));
    return (size_t)n;
}

/* One hexadecimal number and the dot behind it. */
static bool number(const char **at, const char *end, uint64_t most, int64_t *out)
{
    uint64_t v = 0;
    const char *s = *at;
    for (; s < end && *s != '.'; s++) {
        int digit = *s >= '0' && *s <= '9' ? *s - '0' : *s >= 'a' && *s <= 'f' ? *s - 'a' + 10 : -1;
        if (digit < 0 || v > (most - (uint64_t)digit) / 16)
            return false;
        v = v * 16 + (uint64_t)digit;
    }
    if (s == *at || s == end || v > most)
        return false;
    *out = (int64_t)v;
    *at = s + 1;
    return true;
}

static bool checked(const char *text, size_t len)
{
    enum { CHECK = 9 };                 /* with its dot */
    char sum[CHECK + 1];
    if (len < PREFIX + CHECK)
        return false;
    snprintf(sum, sizeof sum, ".%08" PRIx32, XXH32(text, len - CHECK, 0));
    return !memcmp(text + len - CHECK, sum, CHECK);
}

lm_status quarantine_parse(const char *text, size_t len, int64_t base, struct quarantine_mark *out)
{
    static const uint64_t most[FIELDS] = { INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX, COUNT_MAX,
                                           COUNT_MAX, UINT32_MAX, IDLE | SOLO };
    int64_t v[FIELDS];
    if (len < PREFIX || memcmp(text, prefix, PREFIX))
        return LM_NOT_FOUND;
    if (len > QUARANTINE_TEXT_MAX || !checked(text, len))
        return LM_FORMAT;
    const char *at = text + PREFIX, *end = text + len;
    for (int i = 0; i < FIELDS; i++)
        if (!number(&at, end, most[i], &v[i]))
            return LM_FORMAT;
    if (v[0] != base)
        return LM_MISMATCH;
    for (int i = 1; i < 4; i++)
        if (v[i] > INT64_MAX - base)
            return LM_FORMAT;
    *out = (struct quarantine_mark){
        .fence = base + v[1], .until = base + v[2], .suspect = v[3] ? base + v[3] - 1 : -1,
        .deaths = (int)v[4], .alone = (int)v[5], .owner = (uint32_t)v[6], .idle = v[7] & IDLE,
        .solo = v[7] & SOLO,
    };
    return LM_OK;
}
