/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli.c - settings, signals and lines of input for the command line tools; see cli.h.
 */
#include "worker/tools/cli.h"

#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <utf8proc.h>

/* ---- settings --------------------------------------------------------------------------- */

lm_status cli_settings_file(struct cli_settings *s, const char *path, struct lm_err *err)
{
    if (s->n_files == CLI_MAX_FILES)
        return lm_err_set(err, LM_TOO_LARGE, "more than %d -c options", CLI_MAX_FILES);
    s->file[s->n_files++] = path;
    return LM_OK;
}

lm_status cli_settings_add(struct cli_settings *s, const char *assignment, struct lm_err *err)
{
    if (s->n_set == CLI_MAX_SET)
        return lm_err_set(err, LM_TOO_LARGE, "more than %d --set options; use a file",
                          CLI_MAX_SET);
    s->set[s->n_set++] = assignment;
    return LM_OK;
}

lm_status cli_settings_load(const struct cli_settings *s, struct config *c, struct lm_err *err)
{
    lm_status st = config_init(c, err);
    for (int i = 0; st == LM_OK && i < s->n_files; i++)
        st = config_read_file(c, s->file[i], err);
    for (int i = 0; st == LM_OK && i < s->n_set; i++)
        if ((st = config_set(c, s->set[i], err)))
            lm_err_prefix(err, "--set number %d", i + 1);
    if (st != LM_OK) {
        config_release(c);
        *c = (struct config){ 0 };
    }
    return st;
}

lm_status cli_parse_number(const char *option, const char *text, int64_t min, int64_t max,
                           int64_t *out, struct lm_err *err)
{
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    bool digits = *text == '-' || (*text >= '0' && *text <= '9');
    if (!digits || *end || errno || v < min || v > max)
        return lm_err_set(err, LM_INVALID, "%s %s: must be a whole number from %lld to %lld",
                          option, text, (long long)min, (long long)max);
    *out = v;
    return LM_OK;
}

lm_status cli_parse_since(const char *option, const char *text, int64_t *out, struct lm_err *err)
{
    static const struct { char unit; int64_t ms; } units[] = {
        { 's', 1000 }, { 'm', 60000 }, { 'h', 3600000 }, { 'd', 86400000 },
    };
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    bool digits = *text >= '0' && *text <= '9' && !errno;
    if (digits && !*end) {
        *out = v;
        return LM_OK;
    }
    for (size_t i = 0; digits && i < LM_COUNT(units); i++)
        if (*end == units[i].unit && !end[1] && v <= 36500 * 86400000LL / units[i].ms) {
            *out = LM_MAX(lm_wall_ms() - v * units[i].ms, 0);
            return LM_OK;
        }
    return lm_err_set(err, LM_INVALID, "%s %s: use 90s, 10m, 2h, 1d or epoch milliseconds",
                      option, text);
}

/* ---- other people's text ---------------------------------------------------------------- */

static bool is_control(utf8proc_int32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0);
}

/* The length of the character at `s`, 0 where it is none or a control character. */
static size_t printable(const unsigned char *s, size_t len)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t n = utf8proc_iterate(s, (utf8proc_ssize_t)len, &c);
    return n <= 0 || is_control(c) ? 0 : (size_t)n;
}

void cli_print_text(const char *s, size_t len)
{
    const unsigned char *at = (const unsigned char *)s, *end = at + len;
    while (at < end) {
        size_t n = printable(at, (size_t)(end - at));
        if (n)
            fwrite(at, 1, n, stdout);
        else
            printf("\\x%02x", *at);
        at += LM_MAX(n, (size_t)1);
    }
}

void cli_copy_text(char *to, size_t size, const char *from)
{
    const unsigned char *at = (const unsigned char *)(from ? from : "");
    const unsigned char *end = at + strlen((const char *)at);
    size_t used = 0;
    while (at < end) {
        size_t n = printable(at, (size_t)(end - at)), take = LM_MAX(n, (size_t)1);
        if (used + take >= size)
            break;
        memcpy(to + used, n ? (const char *)at : "?", take);
        used += take;
        at += take;
    }
    to[used] = '\0';
}

bool cli_is_text(const void *s, size_t len)
{
    const unsigned char *at = s, *end = at + len;
    while (at < end) {
        size_t n = *at == '\n' || *at == '\t' ? 1 : printable(at, (size_t)(end - at));
        if (!n)
            return false;
        at += n;
    }
    return true;
}

void cli_print_json_text(const char *text)
{
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == 0x7f)
            fputs("\\u007f", stdout);
        else if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0)
            printf("\\u00%02x", *++c);
        else
            putchar(*c);
    }
}

void cli_print_json(const json_t *o, size_t flags)
{
    char *text = o ? json_dumps(o, flags) : NULL;
    if (text)
        cli_print_json_text(text);
    putchar('\n');
    free(text);
}

/* ---- signals ---------------------------------------------------------------------------- */

static atomic_bool interrupted;         /* lock-free, so a handler may set it */

static void on_signal(int sig)
{
    interrupted = true;
    signal(sig, SIG_DFL);
}

void cli_catch_signals(void)
{
    struct sigaction sa = { .sa_handler = on_signal };
    sigemptyset(&sa.sa_mask);
    interrupted = false;
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
}

bool cli_interrupted(void)
{
    return interrupted;
}

/* ---- lines of input --------------------------------------------------------------------- */

lm_status cli_lines_open(struct cli_lines *l, const char *path, struct lm_err *err)
{
    *l = (struct cli_lines){ 0 };
    l->in = !strcmp(path, "-") ? stdin : fopen(path, "re");
    if (!l->in)
        return lm_err_set(err, errno == ENOENT ? LM_NOT_FOUND : LM_IO, "%s: %s", path,
                          strerror(errno));
    return LM_OK;
}

void cli_lines_close(struct cli_lines *l)
{
    if (l->in && l->in != stdin)
        fclose(l->in);
    free(l->text);
    *l = (struct cli_lines){ 0 };
}

static lm_status grow(struct cli_lines *l, struct lm_err *err)
{
    size_t size = l->size ? LM_MIN(l->size * 2, CLI_MAX_LINE + 1) : 4096;
    char *text = lm_reallocarray(l->text, size, 1);
    if (!text)
        return lm_err_set(err, LM_NOMEM, "line %llu: no memory for %zu bytes",
                          (unsigned long long)l->number, size);
    l->text = text;
    l->size = size;
    return LM_OK;
}

static void skip_line(FILE *in)
{
    int c;
    while ((c = getc_unlocked(in)) != EOF && c != '\n')
        ;
}

/* One line, blank or not. */
static lm_status read_line(struct cli_lines *l, struct lm_err *err)
{
    int c;
    l->len = 0;
    l->number++;
    while ((c = getc_unlocked(l->in)) != EOF && c != '\n') {
        if (l->len == CLI_MAX_LINE) {
            skip_line(l->in);
            return lm_err_set(err, LM_TOO_LARGE, "longer than %zu bytes", CLI_MAX_LINE);
        }
        if (l->len + 1 >= l->size && grow(l, err) != LM_OK)
            return LM_NOMEM;
        l->text[l->len++] = (char)c;
    }
    if (c == EOF && ferror(l->in))
        return errno == EINTR && interrupted ? LM_NOT_FOUND
                                             : lm_err_set(err, LM_IO, "line %llu: %s",
                                                          (unsigned long long)l->number,
                                                          strerror(errno));
    if (c == EOF && l->len == 0)
        return LM_NOT_FOUND;
    if (l->size == 0 && grow(l, err) != LM_OK)
        return LM_NOMEM;
    if (l->len > 0 && l->text[l->len - 1] == '\r')
        l->len--;
    l->text[l->len] = '\0';
    return LM_OK;
}

static bool is_blank(const char *s, size_t len)
{
    return strspn(s, " \t") == len;
}

lm_status cli_lines_next(struct cli_lines *l, struct lm_err *err)
{
    lm_status st;
    do
        st = read_line(l, err);
    while (st == LM_OK && is_blank(l->text, l->len));
    return st;
}

uint64_t cli_lines_count(const char *path)
{
    struct cli_lines l;
    uint64_t n = 0;
    lm_status st;
    struct stat sb;
    if (stat(path, &sb) != 0 || !S_ISREG(sb.st_mode) || cli_lines_open(&l, path, NULL) != LM_OK)
        return 0;
    while ((st = cli_lines_next(&l, NULL)) == LM_OK || st == LM_TOO_LARGE)
        n++;
    cli_lines_close(&l);
    return n;
}
