/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat_internal.h - what the chat files share: a recognised template as data.
 *
 * chat_parse.c reads a Jinja template's statements, chat_family.c turns those of a known family
 * into a struct chat_form, chat.c loads files and renders. Nothing is executed: the form says which
 * texts surround a message of each role and where the system message goes.
 */
#ifndef LORAMILL_ENGINE_CHAT_INTERNAL_H
#define LORAMILL_ENGINE_CHAT_INTERNAL_H

#include <time.h>

#include "engine/chat.h"
#include "engine/tok_internal.h"

#define CHAT_MAX_TEMPLATE ((size_t)256 << 10)
#define CHAT_MAX_STATEMENTS 2048
#define CHAT_MAX_TERMS 12

/* One operand of a concatenation such as '[INST] ' + message['content'] + ' [/INST]'. */
struct chat_term {
    enum { TERM_TEXT, TERM_BOS, TERM_EOS, TERM_ROLE, TERM_CONTENT, TERM_SYSTEM, TERM_DATE } kind;
    bool trim;                  /* as Python's str.strip() */
    char *text;                 /* TERM_TEXT, malloc'ed */
    size_t len;
};
struct chat_concat {
    struct chat_term term[CHAT_MAX_TERMS];
    int n;
};
void chat_concat_release(struct chat_concat *c);

/* A statement of the template, normalised: no comments, no needless blanks, literals in single
 * quotes with escapes resolved, a.b written as a['b'] for role and content, .strip() as |trim. */
struct chat_statement {
    enum { STMT_EMIT, STMT_CODE } kind;
    char *s;                    /* what stands between the braces */
    size_t n;
};
struct chat_source {
    struct chat_statement *stmt;
    int n;
    bool stray_text;            /* text outside the braces, which would be written out */
};
lm_status chat_source_parse(struct chat_source *src, const char *s, size_t n, struct lm_err *err);
void chat_source_release(struct chat_source *src);
bool chat_source_has(const struct chat_source *src, const char *code);  /* any statement holds it */
/* False: not a concatenation of terms that we know. The caller releases *out either way. */
bool chat_concat_parse(struct chat_concat *out, const char *s, size_t n);

enum chat_family { CHAT_UNKNOWN, CHAT_LLAMA2, CHAT_LLAMA3, CHAT_MISTRAL, CHAT_CHATML };

struct chat_form {
    enum chat_family family;
    enum {
        SYS_AS_MESSAGE,         /* like any other role */
        SYS_OWN,                /* leading one is written by `system`; also the default */
        SYS_FIRST_USER,         /* leading one goes into the first user message (user_sys) */
        SYS_LAST_USER,          /* ... into the last message, if that is a user's */
        SYS_SAME_USER,          /* ... into each user message equal to the last user's */
        SYS_REFUSED,
    } sys;
    bool alternate;             /* user, assistant, user, ... is enforced */
    bool thinks;                /* Qwen3: thoughts are cut from earlier answers */
    bool has_default;           /* default_system stands in for a missing system message */
    struct chat_concat start;   /* once, before everything */
    struct chat_concat system, user, user_sys, assistant, generate;
    struct chat_concat default_system;
    char date_format[32];       /* of TERM_DATE through strftime, or */
    char date_fixed[64];        /* the date itself */
};
void chat_form_release(struct chat_form *f);
/* family stays CHAT_UNKNOWN when the template is none we know; only memory can fail. */
lm_status chat_recognise(const char *s, size_t n, struct chat_form *f, struct lm_err *err);

/* chat_render() at a given moment, for templates that write today's date. */
lm_status chat_render_at(const chat_template *c, const struct engine_message *messages, int n,
                         time_t now, char **text, struct lm_err *err);

#endif
