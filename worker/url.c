/* SPDX-License-Identifier: Apache-2.0 */
/* url.c - see url.h. */
#include "worker/url.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kernels/base.h"

/* Behind the scheme and its slashes, if it has one. Without its colon, or with slashes alone, it is
 * no URL, but may have been meant as one. */
static const char *authority(const char *url)
{
    const char *at = url + strcspn(url, "/?#@");
    size_t slashes = strspn(at, "/");
    bool scheme = slashes && (at == url || at[-1] == ':' || slashes > 1);
    return scheme ? at + slashes : url;
}

/* The last @ before the path; NULL: there is none. */
static const char *userinfo_end(const char *name)
{
    return memrchr(name, '@', strcspn(name, "/?#"));
}

/* "me:pa/ss@host": a password written as it is, slash and all, reads as a port that is none. Where
 * it ends nobody can tell, and libcurl refuses it. */
static bool is_cut_password(const char *name)
{
    size_t n = strcspn(name, "/?#");
    const char *colon = *name == '[' ? NULL : memchr(name, ':', n);
    return colon && colon + 1 + strspn(colon + 1, "0123456789") < name + n && strchr(name, '@');
}

void url_show(const char *url, char *buf, size_t size)
{
    const char *name = authority(url), *end = name + strcspn(name, "?#");
    const char *at = userinfo_end(name), *rest = at ? at + 1 : name;
    if (!at && is_cut_password(name))
        snprintf(buf, size, "%.*s...", (int)(name - url), url);
    else
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
    return userinfo_end(name) || is_cut_password(name);
}

bool url_has_scheme(const char *url, const char *scheme)
{
    return !strncasecmp(url, scheme, strlen(scheme));
}

const char *url_path(const char *url)
{
    /* Of a file the host may be missing, and no slash is forgiven. */
    const char *host = url_has_scheme(url, "file://") ? url + strlen("file://") : authority(url);
    return host + strcspn(host, "/?#");
}

bool url_is_http(const char *url)
{
    return url_has_scheme(url, "http://") || url_has_scheme(url, "https://");
}
