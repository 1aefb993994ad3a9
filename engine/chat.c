/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat.c - loading a model's chat template and rendering messages with it.
 *
 * Looked for in this order, as transformers does: chat_template.jinja, "chat_template" of
 * tokenizer_config.json (a string, or a list of {name, template} of which "default" counts),
 * "chat_template" of chat_template.json. An unknown template is no error at load: it is remembered
 * by what it begins with, and every chat is refused with that.
 *
 * The rendered text equals transformers' apply_chat_template(messages, add_generation_prompt=True);
 * where the template raises an exception, chat_render() returns LM_INVALID. Special tokens that
 * occur in a message's own content are recognised when the text is encoded, as in transformers:
 * whoever passes on foreign text must take them out.
 *
 * A chat_template is immutable after load and may be used from any thread.
 */
#include "engine/chat_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHOWN 60                        /* bytes of an unknown template in messages */

struct chat_template {
    struct chat_form form;
    char *bos, *eos;                    /* NULL: the model has none */
    char begins[SHOWN + 1];             /* of an unknown template; empty: there is none */
};

/* ---- loading ----------------------------------------------------------------------------- */

/* NULL when there is no such file; *st tells that from failure. */
static json_t *read_json(const char *dir, const char *name, lm_status *st, struct lm_err *err)
{
    char path[4096], *text;
    size_t n;
    json_error_t je;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", dir, name) >= sizeof path) {
        *st = lm_err_set(err, LM_INVALID, "the model folder's name is too long");
        return NULL;
    }
    struct lm_err missing = {0};
    *st = tok_read_file(path, &text, &n, &missing);
    if (*st == LM_NOT_FOUND) {
        *st = LM_OK;
        return NULL;
    }
    if (*st) {
        lm_err_set(err, *st, "%s", missing.msg);
        return NULL;
    }
    json_t *j = json_loadb(text, n, JSON_ALLOW_NUL, &je);
    free(text);
    if (!json_is_object(j)) {
        *st = lm_err_set(err, LM_FORMAT, "%s: %s", path, j ? "not a JSON object" : je.text);
        json_decref(j);
        return NULL;
    }
    return j;
}

/* A special token is a string or an object with "content". */
static lm_status special_token(json_t *j, const char *key, char **out, struct lm_err *err)
{
    json_t *v = json_object_get(j, key);
    const char *s = json_string_value(json_is_object(v) ? json_object_get(v, "content") : v);
    if (!s || *out)
        return LM_OK;
    *out = lm_strdup(s);
    return *out ? LM_OK : tok_nomem(err);
}

static const char *template_in(json_t *j, size_t *n)
{
    json_t *v = json_object_get(j, "chat_template"), *each;
    size_t i;
    if (json_is_array(v)) {
        json_t *list = v;
        v = NULL;
        json_array_foreach(list, i, each) {
            const char *name = json_string_value(json_object_get(each, "name"));
            if (name && strcmp(name, "default") == 0)
                v = json_object_get(each, "template");
        }
    }
    *n = json_string_length(v);
    return json_string_value(v);
}

static lm_status use(chat_template *c, const char *s, size_t n, struct lm_err *err)
{
    lm_status st = chat_recognise(s, n, &c->form, err);
    if (!st && c->form.family == CHAT_UNKNOWN) {
        while (n && (*s == '\n' || *s == ' ')) {
            s++;
            n--;
        }
        snprintf(c->begins, sizeof c->begins, "%.*s", (int)LM_MIN(n, (size_t)SHOWN), s);
        if (!*c->begins)
            snprintf(c->begins, sizeof c->begins, "(nothing)");
    }
    return st;
}

static lm_status load_tokens(chat_template *c, json_t *config, const char *dir, struct lm_err *err)
{
    lm_status st = special_token(config, "bos_token", &c->bos, err);
    if (!st)
        st = special_token(config, "eos_token", &c->eos, err);
    if (st || (c->bos && c->eos))
        return st;
    json_t *map = read_json(dir, "special_tokens_map.json", &st, err);
    if (!st)
        st = special_token(map, "bos_token", &c->bos, err);
    if (!st)
        st = special_token(map, "eos_token", &c->eos, err);
    json_decref(map);
    return st;
}

static lm_status load_template(chat_template *c, json_t *config, const char *dir,
                               struct lm_err *err)
{
    char path[4096], *text;
    size_t n;
    struct lm_err missing = {0};
    if ((size_t)snprintf(path, sizeof path, "%s/chat_template.jinja", dir) >= sizeof path)
        return lm_err_set(err, LM_INVALID, "the model folder's name is too long");
    lm_status st = tok_read_file(path, &text, &n, &missing);
    if (!st) {
        st = use(c, text, n, err);
        free(text);
        return st;
    }
    if (st != LM_NOT_FOUND)
        return lm_err_set(err, st, "%s", missing.msg);
    const char *s = template_in(config, &n);
    if (s)
        return use(c, s, n, err);
    json_t *other = read_json(dir, "chat_template.json", &st, err);
    if (!st && (s = template_in(other, &n)))
        st = use(c, s, n, err);
    json_decref(other);
    return st;
}

lm_status chat_template_load(const char *dir, chat_template **out, struct lm_err *err)
{
    lm_status st = LM_OK;
    chat_template *c = lm_calloc(1, sizeof *c);
    if (!c)
        return tok_nomem(err);
    json_t *config = read_json(dir, "tokenizer_config.json", &st, err);
    if (!st)
        st = load_tokens(c, config, dir, err);
    if (!st)
        st = load_template(c, config, dir, err);
    json_decref(config);
    if (st) {
        chat_template_free(c);
        return st;
    }
    *out = c;
    return LM_OK;
}

void chat_template_free(chat_template *c)
{
    if (!c)
        return;
    chat_form_release(&c->form);
    free(c->bos);
    free(c->eos);
    free(c);
}

const char *chat_template_family(const chat_template *c)
{
    static const char *const name[] = {NULL, "llama2", "llama3", "mistral", "chatml"};
    return name[c->form.family];
}

/* ---- writing ----------------------------------------------------------------------------- */

struct span {
    const char *s;
    size_t n;
};

/* What a concatenation's names stand for at one place. */
struct values {
    const char *role;
    struct span content, system;
    const char *date;
};

struct rendering {
    const chat_template *c;
    const struct chat_form *f;
    const struct engine_message *m;
    int n;
    char date[128];
    struct tok_buf out;
    struct lm_err *err;
};

static bool python_space(int32_t cp)
{
    return tok_is_space(cp) || (cp >= 0x1C && cp <= 0x1F);
}

static struct span strip(struct span t)
{
    int32_t cp;
    while (t.n) {
        size_t len = (size_t)tok_utf8_next(t.s, &cp);
        if (!python_space(cp))
            break;
        t.s += len;
        t.n -= len;
    }
    while (t.n) {
        size_t at = t.n - 1;
        while (at && ((unsigned char)t.s[at] & 0xC0) == 0x80)
            at--;
        tok_utf8_next(t.s + at, &cp);
        if (!python_space(cp))
            break;
        t.n = at;
    }
    return t;
}

static struct span term_value(const struct rendering *r, const struct chat_term *t,
                              const struct values *v)
{
    struct span s = {NULL, 0};
    switch (t->kind) {
    case TERM_TEXT: return (struct span){t->text, t->len};
    case TERM_CONTENT: s = v->content; break;
    case TERM_SYSTEM: s = v->system; break;
    case TERM_BOS: s.s = r->c->bos; break;
    case TERM_EOS: s.s = r->c->eos; break;
    case TERM_ROLE: s.s = v->role; break;
    case TERM_DATE: s.s = v->date; break;
    }
    if (t->kind != TERM_CONTENT && t->kind != TERM_SYSTEM)
        s.n = s.s ? strlen(s.s) : 0;
    return t->trim && s.s ? strip(s) : s;
}

static lm_status write_concat(struct rendering *r, const struct chat_concat *c,
                              const struct values *v, struct tok_buf *out)
{
    for (int i = 0; i < c->n; i++) {
        struct span s = term_value(r, &c->term[i], v);
        if (!s.s && c->n > 1)           /* alone, an undefined name is written as nothing */
            return lm_err_set(r->err, LM_UNSUPPORTED, "the chat template needs %s, which "
                              "tokenizer_config.json does not set",
                              c->term[i].kind == TERM_BOS ? "bos_token" : "eos_token");
        tok_buf_add(out, s.s, s.n);
    }
    return tok_buf_check(out, r->err);
}

/* ---- checking ---------------------------------------------------------------------------- */

static bool is(const struct engine_message *m, const char *role)
{
    return strcmp(m->role, role) == 0;
}

static lm_status check_message(const struct engine_message *m, int i, struct lm_err *err)
{
    if (!m->role || !m->content)
        return lm_err_set(err, LM_INVALID, "messages[%d] lacks role or content", i);
    if (!is(m, "system") && !is(m, "user") && !is(m, "assistant"))
        return lm_err_set(err, LM_INVALID, "messages[%d]: role \"%.64s\" is unknown; use system, "
                          "user or assistant", i, m->role);
    size_t n = strlen(m->content), bad = tok_utf8_check(m->content, n);
    if (n > TOK_MAX_TEXT)
        return lm_err_set(err, LM_TOO_LARGE, "messages[%d] has %zu bytes; %zu are allowed", i, n,
                          TOK_MAX_TEXT);
    if (bad < n)
        return lm_err_set(err, LM_FORMAT, "messages[%d] is not UTF-8 at byte %zu", i, bad);
    return LM_OK;
}

/* first: index of the first message behind a leading system message. */
static lm_status check_roles(const struct rendering *r, int first)
{
    const char *family = chat_template_family(r->c);
    if (r->f->sys == SYS_AS_MESSAGE || r->f->family == CHAT_CHATML || r->f->family == CHAT_LLAMA3)
        return LM_OK;
    for (int i = first; i < r->n; i++) {
        if (is(&r->m[i], "system"))
            return lm_err_set(r->err, LM_INVALID, "messages[%d]: this model's template (%s) takes "
                              "%s", i, family, r->f->sys == SYS_REFUSED ? "no system message"
                              : "a system message only as the first one");
        if (r->f->alternate && is(&r->m[i], "user") != ((i - first) % 2 == 0))
            return lm_err_set(r->err, LM_INVALID, "messages[%d]: role %s is out of turn; this "
                              "model's template (%s) wants user and assistant to alternate, "
                              "beginning with user", i, r->m[i].role, family);
    }
    if (first == r->n && r->f->sys != SYS_OWN)
        return lm_err_set(r->err, LM_INVALID, "a system message alone is no chat for this model's "
                          "template (%s); add a user message", family);
    return LM_OK;
}

/* ---- rendering --------------------------------------------------------------------------- */

static struct span whole(const char *s)
{
    return (struct span){s, strlen(s)};
}

/* The leading system block of templates that have one (SYS_OWN). */
static lm_status write_system(struct rendering *r, bool given)
{
    const struct chat_form *f = r->f;
    struct tok_buf text = {0};
    struct values v = {.role = "system", .system = whole(given ? r->m[0].content : ""),
                       .date = r->date};
    if (!given && !f->has_default)
        return LM_OK;
    if (f->family == CHAT_CHATML)
        return write_concat(r, &f->default_system, &v, &r->out);
    lm_status st = given ? LM_OK : write_concat(r, &f->default_system, &v, &text);
    if (!st && text.len)
        v.system = (struct span){text.p, text.len};
    if (!st)
        st = write_concat(r, &f->system, &v, &r->out);
    tok_buf_release(&text);
    return st;
}

/* Llama 2 trims system and content as one, so they are joined before. */
static lm_status write_llama2_first(struct rendering *r, const char *system, const char *content)
{
    struct tok_buf text = {0};
    tok_buf_add(&text, "<<SYS>>\n", 8);
    tok_buf_add(&text, system, strlen(system));
    tok_buf_add(&text, "\n<</SYS>>\n\n", 11);
    tok_buf_add(&text, content, strlen(content));
    lm_status st = tok_buf_check(&text, r->err);
    struct values v = {.role = "user", .content = {text.p, text.len}};
    if (!st)
        st = write_concat(r, &r->f->user, &v, &r->out);
    tok_buf_release(&text);
    return st;
}

static bool takes_system(const struct rendering *r, int i, int first, int last_user)
{
    if (!first || !is(&r->m[i], "user"))
        return false;
    switch (r->f->sys) {
    case SYS_FIRST_USER: return i == first;
    case SYS_LAST_USER: return i == r->n - 1;
    case SYS_SAME_USER: return strcmp(r->m[i].content, r->m[last_user].content) == 0;
    default: return false;
    }
}

static struct span without_newlines(struct span t, bool left, bool right)
{
    for (; left && t.n && t.s[0] == '\n'; t.s++)
        t.n--;
    while (right && t.n && t.s[t.n - 1] == '\n')
        t.n--;
    return t;
}

/* The last place of a mark in t, or NULL. */
static const char *find_last(struct span t, const char *mark)
{
    size_t k = strlen(mark);
    for (size_t at = t.n >= k ? t.n - k + 1 : 0; at-- > 0;)
        if (memcmp(t.s + at, mark, k) == 0)
            return t.s + at;
    return NULL;
}

/* Qwen3: an answer loses its thoughts; one behind the last question keeps them, in full dress. */
static lm_status write_thinking(struct rendering *r, int i, int last_query)
{
    struct span content = whole(r->m[i].content), thoughts = {"", 0};
    const char *close = find_last(content, "</think>");
    if (close) {
        const char *first = strstr(content.s, "</think>");
        struct span before = without_newlines((struct span){content.s, (size_t)(first - content.s)},
                                              false, true);
        const char *open = find_last(before, "<think>");
        size_t skip = open ? (size_t)(open + 7 - before.s) : 0;
        thoughts = without_newlines((struct span){before.s + skip, before.n - skip}, true, false);
        close += 8;
        content = without_newlines((struct span){close, content.n - (size_t)(close - content.s)},
                                   true, false);
    }
    struct tok_buf *out = &r->out;
    const struct chat_concat *c = &r->f->user;  /* start, role, newline, content, end */
    tok_buf_add(out, c->term[0].text, c->term[0].len);
    tok_buf_add(out, "assistant\n", 10);
    if (i > last_query && (i == r->n - 1 || thoughts.n)) {
        thoughts = without_newlines(thoughts, true, true);
        content = without_newlines(content, true, false);
        tok_buf_add(out, "<think>\n", 8);
        tok_buf_add(out, thoughts.s, thoughts.n);
        tok_buf_add(out, "\n</think>\n\n", 11);
    }
    tok_buf_add(out, content.s, content.n);
    tok_buf_add(out, c->term[4].text, c->term[4].len);
    return tok_buf_check(out, r->err);
}

/* The last user message that isn't a tool's answer in disguise. */
static int last_query(const struct rendering *r)
{
    for (int i = r->n - 1; i >= 0; i--) {
        const char *s = r->m[i].content;
        size_t n = strlen(s);
        bool tool = strncmp(s, "<tool_response>", 15) == 0 && n >= 16 &&
                    strcmp(s + n - 16, "</tool_response>") == 0;
        if (is(&r->m[i], "user") && !tool)
            return i;
    }
    return r->n - 1;
}

static lm_status write_message(struct rendering *r, int i, int first, int last_user)
{
    const struct chat_form *f = r->f;
    const struct engine_message *m = &r->m[i];
    const char *system = first ? r->m[0].content : "";
    struct values v = {.role = m->role, .content = whole(m->content), .system = whole(system)};
    if (takes_system(r, i, first, last_user)) {
        if (f->family == CHAT_LLAMA2)
            return write_llama2_first(r, system, m->content);
        return write_concat(r, &f->user_sys, &v, &r->out);
    }
    if (f->thinks && is(m, "assistant"))
        return write_thinking(r, i, last_user);
    return write_concat(r, f->assistant.n && is(m, "assistant") ? &f->assistant : &f->user, &v,
                        &r->out);
}

static lm_status render(struct rendering *r)
{
    const struct chat_form *f = r->f;
    const struct values none = {.role = ""};
    lm_status st = LM_OK;
    for (int i = 0; i < r->n && !st; i++)
        st = check_message(&r->m[i], i, r->err);
    if (st)
        return st;
    bool leading = is(&r->m[0], "system");
    int first = leading && f->sys != SYS_AS_MESSAGE && f->family != CHAT_CHATML ? 1 : 0;
    int last_user = r->f->thinks ? last_query(r) : r->n - 1;
    while (!f->thinks && last_user > 0 && !is(&r->m[last_user], "user"))
        last_user--;
    st = check_roles(r, f->sys == SYS_REFUSED ? 0 : first);
    if (!st)
        st = write_concat(r, &f->start, &none, &r->out);
    if (!st && f->sys == SYS_OWN && !(leading && f->family == CHAT_CHATML))
        st = write_system(r, leading);
    for (int i = first; i < r->n && !st; i++)
        st = write_message(r, i, first, last_user);
    return st ? st : write_concat(r, &f->generate, &none, &r->out);
}

static void set_date(struct rendering *r, time_t now)
{
    struct tm tm;
    if (*r->f->date_format && localtime_r(&now, &tm)) {
        /* The format is the template's; strftime copes with any, and the buffer is bounded. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        if (strftime(r->date, sizeof r->date, r->f->date_format, &tm) == 0)
            r->date[0] = '\0';
#pragma GCC diagnostic pop
    } else {
        snprintf(r->date, sizeof r->date, "%s", r->f->date_fixed);
    }
}

lm_status chat_render_at(const chat_template *c, const struct engine_message *messages, int n,
                         time_t now, char **text, struct lm_err *err)
{
    struct rendering r = {.c = c, .f = &c->form, .m = messages, .n = n, .err = err};
    if (c->form.family == CHAT_UNKNOWN && !*c->begins)
        return lm_err_set(err, LM_UNSUPPORTED, "the model has no chat template; send a prompt "
                          "instead of messages");
    if (c->form.family == CHAT_UNKNOWN)
        return lm_err_set(err, LM_UNSUPPORTED, "the model's chat template is none we know (llama2, "
                          "llama3, mistral, chatml); it begins with \"%s\"; send a prompt instead "
                          "of messages", c->begins);
    if (n <= 0)
        return lm_err_set(err, LM_INVALID, "messages is empty");
    set_date(&r, now);
    lm_status st = render(&r);
    if (!st) {
        tok_buf_add(&r.out, "", 0);
        st = tok_buf_check(&r.out, err);
    }
    if (st) {
        tok_buf_release(&r.out);
        return st;
    }
    *text = r.out.p;
    return LM_OK;
}

lm_status chat_render(const chat_template *c, const struct engine_message *messages, int n,
                      char **text, struct lm_err *err)
{
    return chat_render_at(c, messages, n, time(NULL), text, err);
}

lm_status chat_encode(const chat_template *c, const tokenizer *t,
                      const struct engine_message *messages, int n, struct token_ids *out,
                      struct lm_err *err)
{
    char *text = NULL;
    lm_status st = chat_render(c, messages, n, &text, err);
    if (!st)
        st = tokenizer_encode(t, text, strlen(text), false, out, err);
    free(text);
    return st;
}
