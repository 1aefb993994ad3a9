/* SPDX-License-Identifier: Apache-2.0 */
/*
 * url.h - URLs of the configuration. In messages, which end in logs and dead letters, without the
 * name and the password before a host, and without the query, which may be a signature. Read as
 * libcurl reads them: a scheme may be missing, and one slash behind it, or three, are forgiven.
 * What it refuses may still hold a password: of that no more is shown than is sure to be none.
 *
 * Threads: any.
 */
#ifndef LORAMILL_WORKER_URL_H
#define LORAMILL_WORKER_URL_H

#include <stdbool.h>
#include <stddef.h>

enum { URL_SHOWN = 256 };       /* a good size for what is shown */

void url_show(const char *url, char *buf, size_t size);
/* Of several, separated by commas. */
void url_show_list(const char *urls, char *buf, size_t size);
/* Has it a name or a password? */
bool url_has_userinfo(const char *url);

/* Does it begin with it ("http://"), in whatever case? */
bool url_has_scheme(const char *url, const char *scheme);
bool url_is_http(const char *url);      /* or https */
/* Where what stands behind the host begins: the path, the query or the fragment, or the end. */
const char *url_path(const char *url);

#endif
