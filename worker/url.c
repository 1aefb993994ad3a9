/* SPDX-License-Identifier: Apache-2.0 */
/* url.c - see url.h. */
#include "worker/url.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"

/* Behind the scheme and its slashes, if it has one. */
static const char *authority(const char *url)
{
    const char *at = url + strcspn(url, "/?#@");
    return at > url && at[-1] == ':' ? at + strspn(at, "/") : url;
}

/* The last @ of `n` bytes; NULL: there is none. */
static const char *userinfo_end(const char *s, size_t n)
{
    return memrchr(s, '@', n);
}

void url_show(const char *url, char *buf, size_t size)
{
    const char *name = authority(url), *end = name + strcspn(name, "?#");
    const char *at = userinfo_end(name, strcspn(name, "/?#"));
    const char *rest = at ? at + 1 : name;
    snprintf(buf, size, "%.*s%.*s", (int)(name - url), url, (int)(end - rest), rest);
}

void url_show_list(const char *urls, char *buf, size_t size)
{
    char *copy = lm_strdup(urls), *rest = copy, *url;
    size_t n = 0;
    buf[0] = '\0';
    while ((url = strsep(&rest, ",")) && n + 1 < size) {
        if (n)
            buf[n++] = ',';
        url_show(url, buf + n, size - n);
        n += strlen(buf + n);
    }
    free(copy);
}

bool url_has_userinfo(const char *url)
{
    const char *name = authority(url);
    return userinfo_end(name, strcspn(name, "/?#"));
}
