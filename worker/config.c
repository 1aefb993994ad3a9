/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.c - parses properties by the table of config_table.c. Every refusal names the key and, for
 * files, FILE:LINE; an unknown key names its nearest neighbour (edit distance), because a typo that
 * is silently ignored costs a night.
 *
 * File syntax: one `key = value` a line; blanks around both are dropped; a line whose first visible
 * byte is '#' or '!' is a comment. A value runs to the end of its line: no quotes, no escapes and
 * no continuation, so that what you see is what is set. Later lines win.
 */
#include "worker/config.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "worker/codec/registry.h"
#include "worker/url.h"
#include "worker/url_template.h"

enum { LINE_MAX_BYTES = 64 * 1024, NAME_MAX_BYTES = 128, MAX_CLAIM_URL = 1900, MAX_REGION = 64 };

/* ---- fields ---------------------------------------------------------------------------- */

static char **string_at(struct config *c, const struct config_property *p)
{
    return (char **)((char *)c + p->offset);
}

static const char *string_of(const struct config *c, const struct config_property *p)
{
    return *(char *const *)((const char *)c + p->offset);
}

static int64_t int_of(const struct config *c, const struct config_property *p)
{
    return *(const int64_t *)((const char *)c + p->offset);
}

static lm_status set_string(struct config *c, const struct config_property *p, const char *value,
                            struct lm_err *err)
{
    char *copy = lm_strdup(value);
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "%s: out of memory", p->name);
    char **field = string_at(c, p);
    free(*field);
    *field = copy;
    return LM_OK;
}

static bool is_choice(const char *choices, const char *value)
{
    size_t n = strlen(value);
    for (const char *s = choices; s; s = strchr(s, '|') ? strchr(s, '|') + 1 : NULL)
        if (n == strcspn(s, "|") && !strncmp(s, value, n))
            return true;
    return false;
}

static lm_status set_choice(struct config *c, const struct config_property *p, const char *value,
                            struct lm_err *err)
{
    if (!is_choice(p->choices, value))
        return lm_err_set(err, LM_INVALID, "%s=%s: use one of %s", p->name, value, p->choices);
    return set_string(c, p, value, err);
}

/* A shift for "K", "M", "G", "T" (powers of 1024), with or without "B" or "iB"; -1: none. */
static int size_suffix(const char *s)
{
    if (!*s)
        return 0;
    const char *at = strchr("KMGT", toupper((unsigned char)*s));
    if (!at)
        return -1;
    s++;
    if (*s && strcasecmp(s, "b") && strcasecmp(s, "ib"))
        return -1;
    return 10 * (int)(at - "KMGT" + 1);
}

static bool parse_int(const char *s, bool sizes, int64_t *out)
{
    if (!isdigit((unsigned char)*s) && *s != '-')
        return false;
    char *end;
    errno = 0;
    int64_t v = strtoll(s, &end, 10);
    if (errno || end == s)
        return false;
    int shift = sizes ? size_suffix(end) : *end ? -1 : 0;
    return shift >= 0 && !__builtin_mul_overflow(v, (int64_t)1 << shift, out);
}

static lm_status set_int(struct config *c, const struct config_property *p, const char *value,
                         struct lm_err *err)
{
    int64_t v;
    bool sizes = p->type == CONFIG_BYTES;
    if (!parse_int(value, sizes, &v))
        return lm_err_set(err, LM_INVALID, "%s=%s: not a whole number%s", p->name, value,
                          sizes ? " of bytes (K, M, G and T may follow it)" : "");
    if (v < p->min || v > p->max)
        return lm_err_set(err, LM_INVALID, "%s=%s: out of range %" PRId64 "..%" PRId64, p->name,
                          value, p->min, p->max);
    *(int64_t *)((char *)c + p->offset) = v;
    return LM_OK;
}

static lm_status set_bool(struct config *c, const struct config_property *p, const char *value,
                          struct lm_err *err)
{
    if (strcmp(value, "true") && strcmp(value, "false"))
        return lm_err_set(err, LM_INVALID, "%s=%s: use true or false", p->name, value);
    *(bool *)((char *)c + p->offset) = value[0] == 't';
    return LM_OK;
}

static lm_status set_property(struct config *c, const struct config_property *p, const char *value,
                              struct lm_err *err)
{
    switch (p->type) {
    case CONFIG_STRING: return set_string(c, p, value, err);
    case CONFIG_CHOICE: return set_choice(c, p, value, err);
    case CONFIG_INT:
    case CONFIG_BYTES: return set_int(c, p, value, err);
    case CONFIG_BOOL: return set_bool(c, p, value, err);
    }
    return LM_INTERNAL;
}

/* ---- the table --------------------------------------------------------------------------- */

typedef lm_status visit_fn(const struct config_property *p, void *ctx, struct lm_err *err);

static lm_status each_property(visit_fn *visit, void *ctx, struct lm_err *err)
{
    int n;
    const struct config_section *s = config_sections(&n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < s[i].n; j++) {
            lm_status st = visit(&s[i].rows[j], ctx, err);
            if (st)
                return st;
        }
    return LM_OK;
}

static const struct config_property *find_property(const char *name)
{
    int n;
    const struct config_section *s = config_sections(&n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < s[i].n; j++)
            if (!strcmp(s[i].rows[j].name, name))
                return &s[i].rows[j];
    return NULL;
}

/* Levenshtein distance of two short names. */
static int distance(const char *a, const char *b)
{
    int row[NAME_MAX_BYTES + 1];
    int n = (int)strlen(b);
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = LM_MIN(change, LM_MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[n];
}

struct nearest { const char *wanted, *name; int distance; };

static lm_status visit_nearest(const struct config_property *p, void *ctx, struct lm_err *err)
{
    (void)err;
    struct nearest *best = ctx;
    int d = distance(best->wanted, p->name);
    if (d < best->distance) {
        best->distance = d;
        best->name = p->name;
    }
    return LM_OK;
}

static lm_status unknown_key(const char *key, struct lm_err *err)
{
    if (strlen(key) > NAME_MAX_BYTES)
        return lm_err_set(err, LM_INVALID, "unknown key of %zu bytes", strlen(key));
    struct nearest best = { key, NULL, NAME_MAX_BYTES };
    each_property(visit_nearest, &best, NULL);
    if (best.distance > 4 && !strchr(key, '.'))         /* the second line of a secret, perhaps */
        return lm_err_set(err, LM_INVALID, "unknown key of %zu bytes, like none of ours",
                          strlen(key));
    /* A librdkafka property without its prefix is the commonest slip after a typo. */
    if (best.distance > 4 && strchr(key, '.'))
        return lm_err_set(err, LM_INVALID, "unknown key '%s'; librdkafka's properties are written "
                          "kafka.%s, and the nearest of ours is '%s'", key, key, best.name);
    return lm_err_set(err, LM_INVALID, "unknown key '%s'; did you mean '%s'?", key, best.name);
}

/* ---- kafka.* ---------------------------------------------------------------------------- */

static const char *strip(const char *s, const char *prefix)
{
    size_t n = strlen(prefix);
    return strncmp(s, prefix, n) ? NULL : s + n;
}

/* "consumer.x" and "producer.x" choose a handle; librdkafka has no property of such a name. */
static const char *kafka_scope(const char *key, enum config_scope *scope)
{
    const char *rest;
    if ((rest = strip(key, "consumer."))) {
        *scope = CONFIG_CONSUMER;
        return rest;
    }
    if ((rest = strip(key, "producer."))) {
        *scope = CONFIG_PRODUCER;
        return rest;
    }
    *scope = CONFIG_BOTH;
    return key;
}

static lm_status refuse_owned(const char *full, const char *key, struct lm_err *err)
{
    int n;
    const struct config_owned *o = config_owned(&n);
    for (int i = 0; i < n; i++)
        if (!strcmp(key, o[i].key))
            return lm_err_set(err, LM_INVALID, "%s can't be set: %s", full, o[i].why);
    return LM_OK;
}

static lm_status set_kafka(struct config *c, const char *full, const char *value,
                           struct lm_err *err)
{
    enum config_scope scope;
    const char *key = kafka_scope(full + strlen("kafka."), &scope);
    if (!*key)
        return lm_err_set(err, LM_INVALID, "'%s' lacks a librdkafka property's name", full);
    lm_status st = refuse_owned(full, key, err);
    if (st)
        return st;
    struct config_pair *grown = lm_reallocarray(c->kafka, (size_t)c->n_kafka + 1, sizeof *grown);
    if (!grown)
        return lm_err_set(err, LM_NOMEM, "%s: out of memory", full);
    c->kafka = grown;
    struct config_pair pair = { lm_strdup(key), lm_strdup(value), scope };
    if (!pair.key || !pair.value) {
        free(pair.key);
        free(pair.value);
        return lm_err_set(err, LM_NOMEM, "%s: out of memory", full);
    }
    c->kafka[c->n_kafka++] = pair;
    return LM_OK;
}

/* ---- lists of topics -------------------------------------------------------------------- */

static char *trim(char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    size_t n = strlen(s);
    while (n && isspace((unsigned char)s[n - 1]))
        s[--n] = '\0';
    return s;
}

char *config_next_topic(char **rest)
{
    for (char *t; (t = strsep(rest, ","));)
        if (*(t = trim(t)))
            return t;
    return NULL;
}

enum { PRIORITY_MAX = 1000000 };

#define BLANKS " \t\n\v\f\r"

/* The next `topic=priority` of the list at *at, which moves on: 1 one, 0 the end, -1 it is none. */
static int next_priority(const char **at, char topic[256], int *priority)
{
    *at += strspn(*at, "," BLANKS);
    if (!**at)
        return 0;
    size_t name = strcspn(*at, "=," BLANKS);
    if (!name || name > 249 || (*at)[name] != '=')
        return -1;
    snprintf(topic, 256, "%.*s", (int)name, *at);
    char *end;
    errno = 0;
    long v = strtol(*at + name + 1, &end, 10);
    if (end == *at + name + 1 || (*end && !strchr("," BLANKS, *end)) || errno ||
        v < -PRIORITY_MAX || v > PRIORITY_MAX)
        return -1;
    *priority = (int)v;
    *at = end;
    return 1;
}

int config_topic_priority(const struct config *c, const char *topic)
{
    const char *at = c->topics_priorities;
    char name[256];
    int priority;
    while (next_priority(&at, name, &priority) > 0)
        if (!strcmp(name, topic))
            return priority;
    return 0;
}

static lm_status check_priorities(const struct config *c, struct lm_err *err)
{
    const char *at = c->topics_priorities;
    char name[256];
    int priority, got;
    while ((got = next_priority(&at, name, &priority)) > 0)
        ;
    return got ? lm_err_set(err, LM_INVALID, "topics.priorities: '%.100s' is not topic=priority "
                            "with a priority from -%d to %d", at, PRIORITY_MAX, PRIORITY_MAX)
               : LM_OK;
}

bool config_exactly_once(const struct config *c)
{
    return !strcmp(c->delivery_mode, "exactly-once");
}

const char *config_kafka(const struct config *c, enum config_scope scope, const char *key)
{
    const char *found = NULL;
    for (int i = 0; i < c->n_kafka; i++)
        if ((c->kafka[i].scope == CONFIG_BOTH || c->kafka[i].scope == scope) &&
            !strcmp(c->kafka[i].key, key))
            found = c->kafka[i].value;
    return found;
}

/* ---- parsing ---------------------------------------------------------------------------- */

static lm_status set_pair(struct config *c, const char *key, const char *value,
                          struct lm_err *err)
{
    if (strip(key, "kafka."))
        return set_kafka(c, key, value, err);
    const struct config_property *p = find_property(key);
    if (p && p->offset == offsetof(struct config, in_flight_max_messages))
        c->in_flight_by_default = false;
    return p ? set_property(c, p, value, err) : unknown_key(key, err);
}

static bool is_key(const char *s)
{
    while (isalnum((unsigned char)*s) || (*s && strchr("._-", *s)))
        s++;
    return !*s;
}

static lm_status set_line(struct config *c, char *line, struct lm_err *err)
{
    char *eq = strchr(line, '=');
    if (!eq)                    /* not shown: it may be a secret, or the second line of one */
        return lm_err_set(err, LM_INVALID, "not key=value");
    *eq = '\0';
    char *key = trim(line);
    if (!*key)
        return lm_err_set(err, LM_INVALID, "there is no key before '='");
    if (!is_key(key))           /* a secret's own '=' may be the first of its line */
        return lm_err_set(err, LM_INVALID, "not key=value: what stands before the first '=' can't "
                          "be a key, which has letters, digits and ._- only");
    return set_pair(c, key, trim(eq + 1), err);
}

/* What config_read_again() will take again, in this order. */
static lm_status remember(struct config *c, bool is_file, const char *text, struct lm_err *err)
{
    size_t n = (size_t)c->n_sources;
    struct config_source *grown = lm_reallocarray(c->sources, n + 1, sizeof *grown);
    char *copy = lm_strdup(text);
    if (grown)
        c->sources = grown;
    if (!grown || !copy) {
        free(copy);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    c->sources[n] = (struct config_source){ is_file, copy };
    c->n_sources++;
    return LM_OK;
}

lm_status config_set(struct config *c, const char *assignment, struct lm_err *err)
{
    char *copy = lm_strdup(assignment);
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    lm_status st = set_line(c, copy, err);
    free(copy);
    return st ? st : remember(c, false, assignment, err);
}

static lm_status read_lines(struct config *c, FILE *f, const char *path, struct lm_err *err)
{
    char *line = NULL;
    size_t cap = 0;
    lm_status st = LM_OK;
    int number = 0;
    for (ssize_t n; !st && (n = getline(&line, &cap, f)) >= 0;) {
        number++;
        if (n > LINE_MAX_BYTES)
            st = lm_err_set(err, LM_TOO_LARGE, "longer than %d bytes", LINE_MAX_BYTES);
        else if (memchr(line, '\0', (size_t)n))
            st = lm_err_set(err, LM_FORMAT, "holds a NUL byte; is this a text file?");
        char *text = st ? NULL : trim(line);
        if (text && *text && *text != '#' && *text != '!')
            st = set_line(c, text, err);
    }
    if (st)
        lm_err_prefix(err, "%s:%d", path, number);
    else if (ferror(f))
        st = lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
    free(line);
    return st;
}

lm_status config_read_file(struct config *c, const char *path, struct lm_err *err)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return lm_err_set(err, errno == ENOENT ? LM_NOT_FOUND : LM_IO, "%s: %s", path,
                          strerror(errno));
    lm_status st = read_lines(c, f, path, err);
    fclose(f);
    return st ? st : remember(c, true, path, err);
}

lm_status config_read_again(const struct config *c, struct config *out, struct lm_err *err)
{
    lm_status st = config_init(out, err);
    for (int i = 0; !st && i < c->n_sources; i++) {
        const struct config_source *s = &c->sources[i];
        st = s->is_file ? config_read_file(out, s->text, err) : config_set(out, s->text, err);
    }
    return st ? st : config_check(out, err);
}

/* ---- defaults and checks ------------------------------------------------------------------ */

static lm_status visit_default(const struct config_property *p, void *ctx, struct lm_err *err)
{
    return set_property(ctx, p, p->dflt, err);
}

lm_status config_init(struct config *c, struct lm_err *err)
{
    memset(c, 0, sizeof *c);
    c->in_flight_by_default = true;
    lm_status st = each_property(visit_default, c, err);
    if (st)
        config_release(c);
    return st;
}

static lm_status visit_release(const struct config_property *p, void *ctx, struct lm_err *err)
{
    (void)err;
    if (p->type == CONFIG_STRING || p->type == CONFIG_CHOICE) {
        free(*string_at(ctx, p));
        *string_at(ctx, p) = NULL;
    }
    return LM_OK;
}

void config_release(struct config *c)
{
    each_property(visit_release, c, NULL);
    for (int i = 0; i < c->n_kafka; i++) {
        free(c->kafka[i].key);
        free(c->kafka[i].value);
    }
    free(c->kafka);
    c->kafka = NULL;
    c->n_kafka = 0;
    for (int i = 0; i < c->n_sources; i++)
        free(c->sources[i].text);
    free(c->sources);
    c->sources = NULL;
    c->n_sources = 0;
}

static lm_status visit_required(const struct config_property *p, void *ctx, struct lm_err *err)
{
    if ((p->flags & CONFIG_REQUIRED) && !*string_of(ctx, p))
        return lm_err_set(err, LM_INVALID, "%s may not be empty", p->name);
    return LM_OK;
}

/* Kafka's rule for a topic's name (org.apache.kafka.common.internals.Topic). */
static lm_status check_topic(const char *key, const char *name, struct lm_err *err)
{
    size_t n = strlen(name);
    if (n == 0 || n > 249 || !strcmp(name, ".") || !strcmp(name, ".."))
        return lm_err_set(err, LM_INVALID, "%s: '%s' can't be a topic's name", key, name);
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)name[i]) && !strchr("._-", name[i]))
            return lm_err_set(err, LM_INVALID, "%s: '%s' holds '%c', which a topic's name may not",
                              key, name, name[i]);
    return LM_OK;
}

/* Does a pattern of librdkafka's, POSIX extended, match the topic? LM_INVALID: it is none. */
static lm_status pattern_matches(const char *pattern, const char *topic, bool *yes,
                                 struct lm_err *err)
{
    regex_t re;
    char why[128];
    int e = regcomp(&re, pattern, REG_EXTENDED | REG_NOSUB);
    if (e) {
        regerror(e, &re, why, sizeof why);
        return lm_err_set(err, LM_INVALID, "topics.prompts: '%s' is no regular expression: %s",
                          pattern, why);
    }
    *yes = !regexec(&re, topic, 0, NULL, 0);
    regfree(&re);
    return LM_OK;
}

bool config_reads_topic(const struct config *c, const char *topic)
{
    char *copy = lm_strdup(c->topics_prompts), *rest = copy, *t;
    bool yes = false;
    while (!yes && (t = config_next_topic(&rest))) {
        if (*t != '^')
            yes = !strcmp(t, topic);
        else if (pattern_matches(t, topic, &yes, NULL))
            yes = false;
    }
    free(copy);
    return yes;
}

/* What is in that topic is no prompt. */
static lm_status check_no_loop(const char *name, const char *key, const char *topic,
                               const char *what, struct lm_err *err)
{
    bool same = !strcmp(name, topic);
    lm_status st = *name == '^' ? pattern_matches(name, topic, &same, err)
                                : check_topic("topics.prompts", name, err);
    if (!st && same)
        st = lm_err_set(err, LM_INVALID, "topics.prompts: '%s' is also %s%s%s, which would feed "
                        "the worker %s", name, key, *name == '^' ? "=" : "",
                        *name == '^' ? topic : "", what);
    return st;
}

static lm_status check_prompt_topics(const struct config *c, struct lm_err *err)
{
    char *copy = lm_strdup(c->topics_prompts), *rest = copy, *t;
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    lm_status st = LM_OK;
    int n = 0;
    for (; !st && (t = config_next_topic(&rest)); n++) {
        st = check_no_loop(t, "topics.replies", c->topics_replies, "its own output", err);
        if (!st)
            st = check_no_loop(t, "topics.dead_letters", c->topics_dead_letters, "its own output",
                               err);
        if (!st && *c->topics_control)
            st = check_no_loop(t, "topics.control", c->topics_control, "orders as prompts", err);
    }
    if (!st && !n)
        st = lm_err_set(err, LM_INVALID, "topics.prompts=%s names no topic", c->topics_prompts);
    free(copy);
    return st;
}

static lm_status check_adapters_url(const struct config *c, struct lm_err *err)
{
    return !*c->adapters_url ? LM_OK : url_template_check("adapters.url", c->adapters_url,
                                                          URL_HOLE_ADAPTER, true, err);
}

int64_t config_in_flight(const struct config *c)
{
    if (!c->in_flight_by_default)
        return c->in_flight_max_messages;
    /* While a full transaction ends, half of the next one can gather. */
    int64_t least = config_exactly_once(c) ? c->transaction_max_messages * 3 / 2 : 0;
    return LM_MAX(LM_MAX(c->in_flight_max_messages, c->intake_max_messages), least);
}

static lm_status check_flow(const struct config *c, struct lm_err *err)
{
    if (config_in_flight(c) < c->intake_max_messages)
        return lm_err_set(err, LM_INVALID, "in_flight.max_messages=%" PRId64 " is less than "
                          "intake.max_messages=%" PRId64, c->in_flight_max_messages,
                          c->intake_max_messages);
    if (c->retry_backoff_max_ms < c->retry_backoff_ms)
        return lm_err_set(err, LM_INVALID, "retry.backoff_max_ms=%" PRId64 " is less than "
                          "retry.backoff_ms=%" PRId64, c->retry_backoff_max_ms,
                          c->retry_backoff_ms);
    const char *poll = config_kafka(c, CONFIG_CONSUMER, "max.poll.interval.ms");
    int64_t limit;
    poll = poll ? poll : CONFIG_MAX_POLL_INTERVAL;
    if (parse_int(poll, false, &limit) && c->revoke_drain_ms * 2 > limit)
        return lm_err_set(err, LM_INVALID, "revoke.drain_ms=%" PRId64 " is more than half of "
                          "kafka.max.poll.interval.ms=%s", c->revoke_drain_ms, poll);
    return LM_OK;
}

/* A claim tells its URL to whoever reads replies. */
static lm_status check_claim_url(const struct config *c, struct lm_err *err)
{
    if (url_has_userinfo(c->claim_url))
        return lm_err_set(err, LM_INVALID, "replies.claim_url may not hold a name or a password: "
                          "put them into replies.claim_auth_header, as \"Authorization: Basic "
                          "...\"");
    if (!*c->claim_url)
        return lm_err_set(err, LM_INVALID, "replies.too_large=claim needs replies.claim_url with "
                          URL_HOLE_OBJECT " in it, as https://store/replies/" URL_HOLE_OBJECT);
    if (strlen(c->claim_url) > MAX_CLAIM_URL)
        return lm_err_set(err, LM_TOO_LARGE, "replies.claim_url has more than %d bytes",
                          MAX_CLAIM_URL);
    return url_template_check("replies.claim_url", c->claim_url, URL_HOLE_OBJECT, false, err);
}

static lm_status check_claims(const struct config *c, struct lm_err *err)
{
    if (strcmp(c->replies_too_large, "claim"))
        return LM_OK;
    lm_status st = check_claim_url(c, err);
    if (st)
        return st;
    if (!*c->claim_s3_region != !*c->claim_s3_key || !*c->claim_s3_key != !*c->claim_s3_secret)
        return lm_err_set(err, LM_INVALID, "replies.claim_s3_region, replies.claim_s3_key and "
                          "replies.claim_s3_secret go together");
    if (strlen(c->claim_s3_region) > MAX_REGION)
        return lm_err_set(err, LM_INVALID, "replies.claim_s3_region is no region");
    return LM_OK;
}

static lm_status check_trouble(const struct config *c, struct lm_err *err)
{
    if (c->poison_max_attempts == 1)
        return lm_err_set(err, LM_INVALID, "poison.max_attempts=1 would refuse every prompt that "
                          "was there when a worker died; use 0 (off) or 2 and more");
    if (*c->topics_control) {
        lm_status st = check_topic("topics.control", c->topics_control, err);
        if (st)
            return st;
    }
    return check_claims(c, err);
}

static lm_status check_traces(const struct config *c, struct lm_err *err)
{
    const char *url = c->traces_otlp_url;
    char shown[URL_SHOWN];
    url_show(url, shown, sizeof shown);
    if (url_has_userinfo(url))
        return lm_err_set(err, LM_INVALID, "traces.otlp_url may not hold a name or a password: "
                          "put them into traces.auth_header, as \"Authorization: Basic ...\"");
    if (*url && !url_is_http(url))
        return lm_err_set(err, LM_INVALID, "traces.otlp_url=%s: must begin with http:// or "
                          "https://", shown);
    return LM_OK;
}

lm_status config_check(const struct config *c, struct lm_err *err)
{
    lm_status st = each_property(visit_required, (void *)(uintptr_t)c, err);
    if (st)
        return st;
    if (!strcmp(c->engine_mode, "model") && !*c->model_path)
        return lm_err_set(err, LM_INVALID, "model.path is not set; it names the model's folder");
    const char *brokers = config_kafka(c, CONFIG_CONSUMER, "bootstrap.servers");
    if (!brokers)
        brokers = config_kafka(c, CONFIG_CONSUMER, "metadata.broker.list");
    if (!brokers || !*brokers)
        return lm_err_set(err, LM_INVALID, "kafka.bootstrap.servers is not set; it lists the "
                          "brokers as host:port,host:port");
    if (!strcmp(c->replies_encoding, "avro") && !*c->registry_url)
        return lm_err_set(err, LM_INVALID, "replies.encoding=avro needs registry.url");
    if ((st = check_trouble(c, err)) || (st = check_traces(c, err)))
        return st;
    if ((st = check_topic("topics.replies", c->topics_replies, err)) ||
        (st = check_topic("topics.dead_letters", c->topics_dead_letters, err)) ||
        (st = check_prompt_topics(c, err)) ||
        (st = check_priorities(c, err)) ||
        (st = check_adapters_url(c, err)))
        return st;
    return check_flow(c, err);
}

/* As the XDG base directories have it. Without a home the host's folder, never one in which anybody
 * may write: what lies there is believed. */
static char *default_dir(const char *variable, const char *in_home, const char *of_host,
                         const char *name)
{
    const char *xdg = getenv(variable), *home = getenv("HOME");
    char path[4096];
    if (xdg && *xdg == '/')
        snprintf(path, sizeof path, "%s/loramill/%s", xdg, name);
    else if (home && *home == '/')
        snprintf(path, sizeof path, "%s/%s/loramill/%s", home, in_home, name);
    else
        snprintf(path, sizeof path, "%s/loramill/%s", of_host, name);
    return lm_strdup(path);
}

char *config_journal_dir(const struct config *c)
{
    if (*c->journal_dir)
        return lm_strdup(c->journal_dir);
    return default_dir("XDG_STATE_HOME", ".local/state", "/var/lib", "journal");
}

char *config_cache_dir(const struct config *c)
{
    if (*c->adapters_cache_dir)
        return lm_strdup(c->adapters_cache_dir);
    return default_dir("XDG_CACHE_HOME", ".cache", "/var/cache", "adapters");
}

/* ---- for the registry's client ----------------------------------------------------------- */

struct registry_config config_registry(const struct config *c)
{
    return (struct registry_config){
        .url = c->registry_url, .auth = c->registry_auth, .auth_header = c->registry_auth_header,
        .ca_file = c->registry_ca_file, .cert_file = c->registry_cert_file,
        .key_file = c->registry_key_file,
    };
}

/* ---- secrets ---------------------------------------------------------------------------- */

bool config_is_secret(const char *key)
{
    const struct config_property *p = find_property(key);
    if (p)
        return p->flags & CONFIG_SECRET;
    static const char *const words[] = {
        "password", "secret", "ssl.key", "ssl_key", "oauthbearer.config", "oauthbearer.assertion",
        "token", "credential", "jaas", "ssl.keystore",
    };
    for (size_t i = 0; i < LM_COUNT(words); i++)
        if (strcasestr(key, words[i]))
            return true;
    return false;
}

static const char *shown_text(const struct config *c, const struct config_property *p, char *buf,
                              size_t size)
{
    const char *text = string_of(c, p);
    if ((p->flags & CONFIG_SECRET) && *text)
        return "[set]";
    if (!(p->flags & (CONFIG_URL | CONFIG_URLS)))
        return text;
    (p->flags & CONFIG_URLS ? url_show_list : url_show)(text, buf, size);
    return buf;
}

static lm_status visit_log(const struct config_property *p, void *ctx, struct lm_err *err)
{
    (void)err;
    const struct config *c = ctx;
    char shown[4096];
    switch (p->type) {
    case CONFIG_INT:
    case CONFIG_BYTES:
        lm_log(LM_DEBUG, "config", "%s=%" PRId64, p->name, int_of(c, p));
        break;
    case CONFIG_BOOL:
        lm_log(LM_DEBUG, "config", "%s=%s", p->name,
               *(const bool *)((const char *)c + p->offset) ? "true" : "false");
        break;
    default:
        lm_log(LM_DEBUG, "config", "%s=%s", p->name, shown_text(c, p, shown, sizeof shown));
    }
    return LM_OK;
}

void config_log(const struct config *c)
{
    static const char *const scope[] = { "", "consumer.", "producer." };
    each_property(visit_log, (void *)(uintptr_t)c, NULL);
    for (int i = 0; i < c->n_kafka; i++)
        lm_log(LM_DEBUG, "config", "kafka.%s%s=%s", scope[c->kafka[i].scope], c->kafka[i].key,
               config_is_secret(c->kafka[i].key) ? "[set]" : c->kafka[i].value);
}
