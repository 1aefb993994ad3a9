/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat_family.c - recognising the template of a known family by its own statements.
 *
 * A family is recognised when the statements that write messages have its shape and the ones that
 * place the system message are among those we know. The texts themselves (spaces around [INST], a
 * default system message, the date) are taken from the template, so variants of a family need no
 * list. A template that doesn't mention tools must consist of recognised writes alone; one that
 * does has writes for tool calls besides, which never run without tools. Whatever doesn't fit stays
 * unknown: a refused chat is better than a prompt that the model was not trained on.
 *
 * Sources: the chat_template entries that Meta, Mistral AI and Qwen publish with their models.
 */
#include "engine/chat_internal.h"

#include <stdio.h>
#include <string.h>

void chat_form_release(struct chat_form *f)
{
    chat_concat_release(&f->start);
    chat_concat_release(&f->system);
    chat_concat_release(&f->user);
    chat_concat_release(&f->user_sys);
    chat_concat_release(&f->assistant);
    chat_concat_release(&f->generate);
    chat_concat_release(&f->default_system);
    *f = (struct chat_form){0};
}

/* ---- shapes ------------------------------------------------------------------------------ */

/* The kinds of a concatenation's terms, one letter each: text T, bos B, eos E, role R, content C,
 * system S, date D. */
static bool shape_is(const struct chat_concat *c, const char *shape)
{
    static const char letter[] = "TBERCSD";
    int i = 0;
    while (i < c->n && shape[i] == letter[c->term[i].kind])
        i++;
    return i == c->n && shape[i] == '\0';
}

static const char *text_at(const struct chat_concat *c, int i)
{
    return i < c->n && c->term[i].kind == TERM_TEXT ? c->term[i].text : "";
}

static bool starts(const char *s, const char *with)
{
    return strncmp(s, with, strlen(with)) == 0;
}

static bool ends(const char *s, const char *with)
{
    size_t n = strlen(s), k = strlen(with);
    return n >= k && strcmp(s + n - k, with) == 0;
}

static void move(struct chat_concat *to, struct chat_concat *from)
{
    chat_concat_release(to);
    *to = *from;
    from->n = 0;
}

/* Keeps *from as *to; a second, different one for the same place is an ambiguity. */
static bool keep(struct chat_concat *to, struct chat_concat *from)
{
    bool same = to->n == 0 || to->n == from->n;
    for (int i = 0; same && i < to->n; i++)
        same = to->term[i].kind == from->term[i].kind && to->term[i].trim == from->term[i].trim &&
               to->term[i].len == from->term[i].len &&
               (to->term[i].len == 0 ||
                memcmp(to->term[i].text, from->term[i].text, to->term[i].len) == 0);
    move(to, from);
    return same;
}

/* A family's answer about one concatenation that the template writes. */
enum verdict { FOREIGN, TAKEN, CLASH };

static enum verdict take(struct chat_concat *to, struct chat_concat *c)
{
    return keep(to, c) ? TAKEN : CLASH;
}

typedef enum verdict emit_fn(struct chat_form *f, struct chat_concat *c);

/* Hands each write to the family. False: one that doesn't belong, or two that contradict. */
static bool each_emit(const struct chat_source *src, struct chat_form *f, emit_fn *fn)
{
    bool tools = chat_source_has(src, "tools");
    for (int i = 0; i < src->n; i++) {
        const struct chat_statement *s = &src->stmt[i];
        struct chat_concat c = {.n = 0};
        if (s->kind != STMT_EMIT || starts(s->s, "raise_exception("))
            continue;
        bool known = chat_concat_parse(&c, s->s, s->n);
        enum verdict v = known ? fn(f, &c) : FOREIGN;
        chat_concat_release(&c);
        if (v == CLASH || (v == FOREIGN && !tools))
            return false;
    }
    return true;
}

/* The value of `{% set NAME = ... %}` as a concatenation; the last one that parses. */
static bool find_set(const struct chat_source *src, const char *name, struct chat_concat *out)
{
    size_t n = strlen(name);
    bool found = false;
    for (int i = 0; i < src->n; i++) {
        const struct chat_statement *s = &src->stmt[i];
        struct chat_concat c = {.n = 0};
        if (s->kind != STMT_CODE || !starts(s->s, "set ") || strncmp(s->s + 4, name, n) != 0 ||
            s->s[4 + n] != '=')
            continue;
        if (chat_concat_parse(&c, s->s + 5 + n, s->n - 5 - n)) {
            move(out, &c);
            found = true;
        }
        chat_concat_release(&c);
    }
    return found;
}

/* strftime_now('FORMAT') assigned to `name`, else a literal. */
static void find_date(const struct chat_source *src, const char *name, struct chat_form *f)
{
    char code[64];
    struct chat_concat c = {.n = 0};
    snprintf(code, sizeof code, "set %s=strftime_now('", name);
    for (int i = 0; i < src->n; i++) {
        const char *s = src->stmt[i].s, *end;
        if (!starts(s, code) || !(end = strchr(s + strlen(code), '\'')))
            continue;
        snprintf(f->date_format, sizeof f->date_format, "%.*s", (int)(end - s - strlen(code)),
                 s + strlen(code));
    }
    if (find_set(src, name, &c) && shape_is(&c, "T"))
        snprintf(f->date_fixed, sizeof f->date_fixed, "%s", text_at(&c, 0));
    chat_concat_release(&c);
}

static bool alternates(const struct chat_source *src)
{
    return chat_source_has(src, "(message['role']=='user')!=(loop.index0%2==0)") ||
           chat_source_has(src, "(message['role']=='user')!=(ns.index%2==0)");
}

/* ---- ChatML: <|im_start|>role\n...<|im_end|>\n ------------------------------------------- */

static enum verdict chatml_emit(struct chat_form *f, struct chat_concat *c)
{
    const char *t = text_at(c, 0);
    if (shape_is(c, "TRTCT") && strcmp(t, "<|im_start|>") == 0 && !c->term[3].trim)
        return take(&f->user, c);
    if (shape_is(c, "TST") && strcmp(t, "<|im_start|>system\n") == 0 && !c->term[1].trim)
        return take(&f->system, c);
    if (shape_is(c, "T") && starts(t, "<|im_start|>assistant\n"))
        return take(&f->generate, c);
    if (shape_is(c, "T") && starts(t, "<|im_start|>system\n") && ends(t, "<|im_end|>\n"))
        return take(&f->default_system, c);
    return FOREIGN;
}

/* The template's treatment of <think> must be Qwen3's to the letter, or absent. */
static bool chatml_thinking(const struct chat_source *src, struct chat_form *f)
{
    bool thinking = chat_source_has(src, "</think>')[-1]");
    bool cut = chat_source_has(src, ".split('</think>')[-1].lstrip('\n')");
    bool earlier = chat_source_has(src, "if loop.index0>ns.last_query_index");
    bool last = chat_source_has(src, "if loop.last or(not loop.last and reasoning_content)");
    bool wrap = chat_source_has(src, "\n<think>\n'+reasoning_content.strip('\n')+'\n</think>\n\n'+"
                                     "content.lstrip('\n')");
    f->thinks = thinking;
    return thinking ? cut && earlier && last && wrap
                    : !earlier && !chat_source_has(src, "reasoning_content");
}

static bool chatml(const struct chat_source *src, struct chat_form *f)
{
    if (!chat_source_has(src, "<|im_start|>") || !each_emit(src, f, chatml_emit) || !f->user.n ||
        !f->generate.n || strcmp(text_at(&f->user, 2), "\n") != 0 ||
        strcmp(text_at(&f->user, 4), "<|im_end|>\n") != 0 || !chatml_thinking(src, f))
        return false;
    bool first = chat_source_has(src, "messages[0]['role']");
    if (f->default_system.n && !first)
        return false;                   /* written in some other case than the one we know */
    f->has_default = f->default_system.n > 0;
    f->sys = f->has_default ? SYS_OWN : SYS_AS_MESSAGE;
    f->family = CHAT_CHATML;
    return !chat_source_has(src, "raise_exception") || chat_source_has(src, "tools");
}

/* ---- Llama 3: header, two newlines, trimmed content, <|eot_id|> -------------------------- */

static bool is_llama3_message(const struct chat_concat *c)
{
    return shape_is(c, "TRTCT") && strcmp(text_at(c, 0), "<|start_header_id|>") == 0 &&
           strcmp(text_at(c, 2), "<|end_header_id|>\n\n") == 0 && c->term[3].trim &&
           strcmp(text_at(c, 4), "<|eot_id|>") == 0;
}

static enum verdict llama3_emit(struct chat_form *f, struct chat_concat *c)
{
    const char *t = text_at(c, 0);
    if (is_llama3_message(c))
        return take(&f->user, c);
    if (shape_is(c, "T") && strcmp(t, "<|start_header_id|>assistant<|end_header_id|>\n\n") == 0)
        return take(&f->generate, c);
    if (shape_is(c, "B"))
        return take(&f->start, c);
    if (shape_is(c, "TDT") && strcmp(t, "Today Date: ") == 0)
        return take(&f->default_system, c);
    /* `content` alone is the 3.0 form; the rest are the pieces of the 3.1 system block. */
    if ((shape_is(c, "C") && !c->term[0].trim) || shape_is(c, "S") ||
        (shape_is(c, "T") && (strcmp(t, "<|start_header_id|>system<|end_header_id|>\n\n") == 0 ||
                              starts(t, "Cutting Knowledge Date: ") ||
                              strcmp(t, "<|eot_id|>") == 0)))
        return TAKEN;
    return FOREIGN;
}

/* 3.0: everything is one `content`, which the first message gets the BOS before. */
static bool llama3_plain(const struct chat_source *src, struct chat_form *f)
{
    static const char set[] = "set content='<|start_header_id|>'+message['role']+";
    for (int i = 0; i < src->n && !f->user.n; i++) {
        const struct chat_statement *s = &src->stmt[i];
        if (starts(s->s, set)) {
            struct chat_concat c = {.n = 0};
            if (chat_concat_parse(&c, s->s + 12, s->n - 12) && is_llama3_message(&c))
                move(&f->user, &c);
            chat_concat_release(&c);
        }
    }
    f->start.term[0] = (struct chat_term){.kind = TERM_BOS};
    f->start.n = 1;
    f->sys = SYS_AS_MESSAGE;
    return f->user.n && chat_source_has(src, "if loop.index0==0") &&
           chat_source_has(src, "set content=bos_token+content");
}

static bool put_text(struct chat_concat *c, const char *s)
{
    char *copy = lm_strdup(s);
    if (!copy)
        return false;
    c->term[c->n++] = (struct chat_term){.kind = TERM_TEXT, .text = copy, .len = strlen(copy)};
    return true;
}

/* 3.1 and later: a system block always, with dates before the caller's own words. */
static bool llama3_dated(const struct chat_source *src, struct chat_form *f)
{
    static const char head[] = "<|start_header_id|>system<|end_header_id|>\n\n"
                               "Cutting Knowledge Date: ";
    char text[256];
    const char *cut = NULL;
    for (int i = 0; i < src->n; i++)
        if (src->stmt[i].kind == STMT_EMIT && starts(src->stmt[i].s, "'Cutting Knowledge Date: "))
            cut = src->stmt[i].s + strlen("'Cutting Knowledge Date: ");
    if (!cut || !chat_source_has(src, "set system_message=messages[0]['content']|trim") ||
        !chat_source_has(src, "if messages[0]['role']=='system'") || !f->start.n ||
        !f->default_system.n || strcmp(text_at(&f->default_system, 2), "\n\n") != 0)
        return false;
    snprintf(text, sizeof text, "%s%.*sToday Date: ", head, (int)strcspn(cut, "'"), cut);
    find_date(src, "date_string", f);
    f->sys = SYS_OWN;
    chat_concat_release(&f->default_system);
    struct chat_concat *c = &f->system;
    bool ok = put_text(c, text);
    c->term[c->n++] = (struct chat_term){.kind = TERM_DATE};
    ok &= put_text(c, "\n\n");
    c->term[c->n++] = (struct chat_term){.kind = TERM_SYSTEM, .trim = true};
    ok &= put_text(c, "<|eot_id|>");
    /* Without a system message the block is the same, with nothing in its place. */
    f->has_default = true;
    return ok && (*f->date_format || *f->date_fixed);
}

static bool llama3(const struct chat_source *src, struct chat_form *f)
{
    if (!chat_source_has(src, "<|start_header_id|>") || !each_emit(src, f, llama3_emit) ||
        !f->generate.n)
        return false;
    f->family = CHAT_LLAMA3;
    return f->user.n ? llama3_dated(src, f) : llama3_plain(src, f);
}

/* ---- Llama 2: [INST] <<SYS>> ... --------------------------------------------------------- */

static enum verdict llama2_emit(struct chat_form *f, struct chat_concat *c)
{
    if (shape_is(c, "BTCT") && strcmp(text_at(c, 1), "[INST] ") == 0 && c->term[2].trim)
        return take(&f->user, c);
    if (shape_is(c, "TCTE") && c->term[1].trim)
        return take(&f->assistant, c);
    /* A branch for later system messages, which the check of roles never lets through. */
    if (shape_is(c, "TCT") && starts(text_at(c, 0), "<<SYS>>"))
        return TAKEN;
    return FOREIGN;
}

/* The system message, wrapped, leads the first user message; the two are trimmed as one. */
static bool llama2(const struct chat_source *src, struct chat_form *f)
{
    static const char *const wrapped[] = {
        "set content='<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content']",
        "set system='<<SYS>>\n'+messages[0]['content']+'\n<</SYS>>\n\n'",
    };
    static const char *const placed[] = {
        "if loop.index0==0 and system_message!=false",
        "set content=system+message['content']if loop.index0==0 else message['content']",
    };
    bool known = false;
    for (size_t i = 0; i < LM_COUNT(wrapped); i++)
        known |= chat_source_has(src, wrapped[i]) && chat_source_has(src, placed[i]);
    if (!known || !alternates(src) || !each_emit(src, f, llama2_emit) || !f->user.n ||
        !f->assistant.n || chat_source_has(src, "tools"))
        return false;
    f->family = CHAT_LLAMA2;
    f->sys = SYS_FIRST_USER;
    f->alternate = true;
    return true;
}

/* ---- Mistral: [INST] ... [/INST] answer </s> --------------------------------------------- */

static bool is_inst(const char *open, const char *close)
{
    return (strcmp(open, "[INST]") == 0 || strcmp(open, "[INST] ") == 0 ||
            strcmp(open, " [INST] ") == 0) &&
           (strcmp(close, "[/INST]") == 0 || strcmp(close, " [/INST]") == 0);
}

static enum verdict mistral_emit(struct chat_form *f, struct chat_concat *c)
{
    if (shape_is(c, "B"))
        return take(&f->start, c);
    if (shape_is(c, "TCT") && is_inst(text_at(c, 0), text_at(c, 2)) && !c->term[1].trim)
        return take(&f->user, c);
    if (shape_is(c, "TSTCT") && is_inst(text_at(c, 0), text_at(c, 4)) &&
        !c->term[1].trim && !c->term[3].trim)
        return take(&f->user_sys, c);
    if (shape_is(c, "CE") || shape_is(c, "CET") || (shape_is(c, "TCE") &&
                                                    strcmp(text_at(c, 0), " ") == 0))
        return take(&f->assistant, c);
    if (shape_is(c, "TST") && starts(text_at(c, 0), "[SYSTEM_PROMPT]") && !c->term[1].trim)
        return take(&f->system, c);
    return FOREIGN;
}

static bool mistral_system(const struct chat_source *src, struct chat_form *f)
{
    if (f->system.n) {
        f->sys = SYS_OWN;
        if (f->user_sys.n)
            return false;
        if (!chat_source_has(src, "set system_message=default_system_message"))
            return !chat_source_has(src, "default_system_message");
        f->has_default = find_set(src, "default_system_message", &f->default_system);
        find_date(src, "today", f);
        return f->has_default;
    }
    if (!f->user_sys.n) {
        f->sys = SYS_REFUSED;
        return !chat_source_has(src, "system_message");
    }
    bool last = chat_source_has(src, "if loop.last and system_message is defined");
    bool same = chat_source_has(src, "if(message==user_messages[-1])and system_message is defined");
    bool first = chat_source_has(src, "if loop.first and system_message is defined");
    f->sys = last ? SYS_LAST_USER : same ? SYS_SAME_USER : SYS_FIRST_USER;
    return last + same + first == 1;
}

static bool mistral(const struct chat_source *src, struct chat_form *f)
{
    if (!chat_source_has(src, "[INST]") || chat_source_has(src, "<<SYS>>") ||
        !each_emit(src, f, mistral_emit) || !f->start.n || !f->user.n || !f->assistant.n)
        return false;
    f->family = CHAT_MISTRAL;
    f->alternate = alternates(src);
    return mistral_system(src, f);
}

/* ---- all --------------------------------------------------------------------------------- */

lm_status chat_recognise(const char *s, size_t n, struct chat_form *f, struct lm_err *err)
{
    static bool (*const family[])(const struct chat_source *, struct chat_form *) = {
        chatml, llama3, llama2, mistral,
    };
    struct chat_source src;
    lm_status st = chat_source_parse(&src, s, n, err);
    *f = (struct chat_form){0};
    for (size_t i = 0; !st && !src.stray_text && i < LM_COUNT(family); i++) {
        if (family[i](&src, f))
            break;
        chat_form_release(f);
    }
    chat_source_release(&src);
    return st;
}
