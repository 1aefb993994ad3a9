/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_unicode.c - character classes as the reference sees them.
 *
 * The reference is not of one Unicode version: its regex engine knows 16, Rust's standard library
 * 16 or 17, its normalisation tables 9. PCRE2 and utf8proc know what the distribution packages. The
 * tables of tok_unicode_data.h bridge the gaps; they only add, so a newer library agrees too.
 */
#include "engine/tok_internal.h"

#include <stdio.h>
#include <string.h>

#include <utf8proc.h>

struct range {
    int32_t low, high;
};
struct named_range {
    int32_t low, high;
    char category[3];
};
struct shift {
    int32_t cp, by;
};

#include "engine/tok_unicode_data.h"

static bool in_ranges(const struct range *r, size_t n, int32_t cp)
{
    while (n) {
        size_t mid = n / 2;
        if (cp < r[mid].low) {
            n = mid;
        } else if (cp > r[mid].high) {
            r += mid + 1;
            n -= mid + 1;
        } else {
            return true;
        }
    }
    return false;
}

bool tok_is_space(int32_t cp)
{
    return (cp >= 9 && cp <= 13) || cp == ' ' || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
           (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
           cp == 0x205F || cp == 0x3000;
}

bool tok_is_numeric(int32_t cp)
{
    utf8proc_category_t c = utf8proc_category(cp);
    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO ||
           in_ranges(more_numeric, LM_COUNT(more_numeric), cp);
}

bool tok_is_word(int32_t cp)
{
    switch (utf8proc_category(cp)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM: case UTF8PROC_CATEGORY_LO: case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME: case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return cp == 0x200C || cp == 0x200D || in_ranges(more_word, LM_COUNT(more_word), cp);
    }
}

bool tok_is_norm_inert(int32_t cp)
{
    return cp >= inert[0].low && in_ranges(inert, LM_COUNT(inert), cp);
}

int tok_lower(int32_t cp, int32_t out[2])
{
    if (cp == 0x130) {                  /* the one that becomes two: i with a dot above */
        out[0] = 'i';
        out[1] = 0x307;
        return 2;
    }
    out[0] = cp < 0x80 ? cp + (cp >= 'A' && cp <= 'Z' ? 'a' - 'A' : 0) : utf8proc_tolower(cp);
    for (size_t i = 0; cp >= more_lower[0].cp && i < LM_COUNT(more_lower); i++)
        if (more_lower[i].cp == cp)
            out[0] = cp + more_lower[i].by;
    return 1;
}

static void add_ranges(struct tok_buf *out, const char *name, size_t len)
{
    char item[40];
    for (size_t i = 0; i < LM_COUNT(newer_category); i++) {
        const struct named_range *r = &newer_category[i];
        if (memcmp(r->category, name, len) == 0) {
            snprintf(item, sizeof item, "\\x{%X}-\\x{%X}", (unsigned)r->low, (unsigned)r->high);
            tok_buf_add(out, item, strlen(item));
        }
    }
}

bool tok_unicode_extra(const char *name, size_t len, struct tok_buf *out)
{
    static const char known[][3] = {
        "L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc",
        "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp",
    };
    for (size_t i = 0; i < LM_COUNT(known); i++) {
        if (strlen(known[i]) == len && memcmp(known[i], name, len) == 0) {
            add_ranges(out, name, len);
            return true;
        }
    }
    return false;
}
