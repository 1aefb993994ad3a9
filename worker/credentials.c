/* SPDX-License-Identifier: Apache-2.0 */
/*
 * credentials.c - see credentials.h. What was read last is kept per scope, so that a producer that
 * is made later (producer_open()) does not go back to the password of the start.
 */
#include "worker/credentials.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { REREAD_US = 5 * 1000000, HANDLES = 4, SCOPES = 3 };

struct handle { rd_kafka_t *rk; enum config_scope scope; };
struct pair { char *user, *password; };         /* NULL: as at the start */

struct credentials {
    const struct config *cfg;
    atomic_bool refused;
    int64_t looked_us;          /* main thread's */
    pthread_mutex_t lock;       /* the rest */
    struct handle handles[HANDLES];
    struct pair now[SCOPES];
};

credentials *credentials_new(const struct config *cfg)
{
    credentials *c = lm_calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->cfg = cfg;
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

static void release(struct pair *p)
{
    free(p->user);
    free(p->password);
    *p = (struct pair){ NULL, NULL };
}

void credentials_free(credentials *c)
{
    if (!c)
        return;
    for (int i = 0; i < SCOPES; i++)
        release(&c->now[i]);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

/* ---- clients ---------------------------------------------------------------------------- */

static void give(credentials *c, const struct handle *h)
{
    const struct pair *p = &c->now[h->scope];
    if (!h->rk || !p->password)
        return;
    rd_kafka_error_t *e = rd_kafka_sasl_set_credentials(h->rk, p->user, p->password);
    if (e)
        lm_log(LM_WARN, "kafka", "new SASL credentials: %s", rd_kafka_error_string(e));
    if (e)
        rd_kafka_error_destroy(e);
}

void credentials_attach(credentials *c, rd_kafka_t *rk, enum config_scope scope)
{
    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < HANDLES; i++)
        if (!c->handles[i].rk) {
            c->handles[i] = (struct handle){ rk, scope };
            give(c, &c->handles[i]);
            break;
        }
    pthread_mutex_unlock(&c->lock);
}

void credentials_detach(credentials *c, rd_kafka_t *rk)
{
    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < HANDLES; i++)
        if (c->handles[i].rk == rk)
            c->handles[i].rk = NULL;
    pthread_mutex_unlock(&c->lock);
}

/* ---- looking again ---------------------------------------------------------------------- */

void credentials_error(credentials *c, int err)
{
    if (err == RD_KAFKA_RESP_ERR__AUTHENTICATION ||
        err == RD_KAFKA_RESP_ERR_SASL_AUTHENTICATION_FAILED)
        atomic_store(&c->refused, true);
}

static const char *current(const credentials *c, enum config_scope scope, bool password)
{
    const char *now = password ? c->now[scope].password : c->now[scope].user;
    return now ? now : config_kafka(c->cfg, scope, password ? "sasl.password" : "sasl.username");
}

static bool same(const char *a, const char *b)
{
    return a && b ? !strcmp(a, b) : a == b;
}

/* Takes over what `fresh` says for the scope. True: it is new. */
static bool take(credentials *c, const struct config *fresh, enum config_scope scope)
{
    const char *user = config_kafka(fresh, scope, "sasl.username");
    const char *password = config_kafka(fresh, scope, "sasl.password");
    if (!user || !password ||
        (same(user, current(c, scope, false)) && same(password, current(c, scope, true))))
        return false;
    struct pair p = { lm_strdup(user), lm_strdup(password) };
    if (!p.user || !p.password) {
        release(&p);
        return false;
    }
    release(&c->now[scope]);
    c->now[scope] = p;
    return true;
}

static bool take_all(credentials *c, const struct config *fresh)
{
    bool any = false;
    pthread_mutex_lock(&c->lock);
    for (enum config_scope s = CONFIG_CONSUMER; s <= CONFIG_PRODUCER; s++) {
        if (!take(c, fresh, s))
            continue;
        any = true;
        for (int i = 0; i < HANDLES; i++)
            if (c->handles[i].scope == s)
                give(c, &c->handles[i]);
    }
    pthread_mutex_unlock(&c->lock);
    return any;
}

void credentials_look(credentials *c, bool asked)
{
    struct config fresh;
    struct lm_err err;
    int64_t now = lm_now_us();
    if (!asked && (!atomic_load(&c->refused) || now - c->looked_us < REREAD_US))
        return;
    c->looked_us = now;
    atomic_store(&c->refused, false);
    lm_status st = config_read_again(c->cfg, &fresh, &err);
    if (st)
        lm_log(LM_WARN, "worker", "configuration read again: %s; nothing has changed", err.msg);
    else if (take_all(c, &fresh))
        lm_log(LM_INFO, "worker", "configuration read again: new SASL credentials");
    else
        lm_log(asked ? LM_INFO : LM_DEBUG, "worker", "configuration read again: the SASL "
               "credentials are as they were; everything else needs a restart");
    config_release(&fresh);
}
