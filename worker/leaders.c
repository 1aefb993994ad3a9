/* SPDX-License-Identifier: Apache-2.0 */
/*
 * leaders.c - see leaders.h. The format is librdkafka's STATISTICS.md. A record is numbered by its
 * partition as it is queued: `msgs` were, and `acked_msgid` is the last one that was acknowledged.
 * The partition's own count of what waits leaves out what its broker's thread has taken up.
 */
#include "worker/leaders.h"

#include <stdio.h>
#include <string.h>

#include "worker/client_stats.h"

enum { ASK_MS = 1000 };

/* Notes it for the next time. True: it has waited for so long, and nothing has moved meanwhile. */
static bool waits(const struct leaders *l, json_t *now, long long at_us, const char *topic,
                  const json_t *p)
{
    char name[320];
    long long acked = stats_number(p, "acked_msgid");
    if (stats_number(p, "msgs") == acked)
        return false;
    snprintf(name, sizeof name, "%s [%lld]", topic, stats_number(p, "partition"));
    const json_t *before = json_object_get(l->last, name);
    bool same = before && stats_number(before, "acked") == acked;
    long long since_us = same ? stats_number(before, "since_us") : at_us;
    json_object_set_new(now, name, json_pack("{s:I, s:I}", "acked", (json_int_t)acked,
                                             "since_us", (json_int_t)since_us));
    return at_us - since_us >= LEADERS_STUCK_US;
}

size_t leaders_stuck(struct leaders *l, const json_t *stats, struct stuck *out, size_t most)
{
    const char *topic, *id;
    json_t *t, *p, *now = json_object();
    long long at_us = stats_number(stats, "ts");
    size_t n = 0;
    if (stats_number(stats, "msg_cnt") > 0)
        json_object_foreach(json_object_get(stats, "topics"), topic, t)
            json_object_foreach(json_object_get(t, "partitions"), id, p) {
                if (stats_number(p, "partition") < 0 || !waits(l, now, at_us, topic, p) ||
                    n == most)
                    continue;
                out[n] = (struct stuck){ .partition = (int32_t)stats_number(p, "partition"),
                                         .leader = (int32_t)stats_number(p, "leader") };
                snprintf(out[n++].topic, sizeof out->topic, "%s", topic);
            }
    leaders_release(l);
    l->last = now;
    return n;
}

void leaders_release(struct leaders *l)
{
    json_decref(l->last);
    l->last = NULL;
}

bool leaders_differ(const struct stuck *s, const rd_kafka_metadata_t *md)
{
    for (int t = 0; t < md->topic_cnt; t++) {
        const rd_kafka_metadata_topic_t *topic = &md->topics[t];
        if (topic->err || strcmp(topic->topic, s->topic) != 0)
            continue;
        for (int i = 0; i < topic->partition_cnt; i++) {
            const rd_kafka_metadata_partition_t *p = &topic->partitions[i];
            if (p->id == s->partition)
                return p->leader >= 0 && p->leader != s->leader;
        }
    }
    return false;
}

size_t leaders_moved(rd_kafka_t *rk, const struct stuck *s, size_t n)
{
    const rd_kafka_metadata_t *md;
    if (!n || rd_kafka_metadata(rk, 0, NULL, &md, ASK_MS))
        return n;
    size_t found = 0;
    while (found < n && !leaders_differ(&s[found], md))
        found++;
    rd_kafka_metadata_destroy(md);
    return found;
}
