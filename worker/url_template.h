/* SPDX-License-Identifier: Apache-2.0 */
/*
 * url_template.h - URLs of the configuration with a hole in them: adapters.url has one for an
 * adapter's id, replies.claim_url one for an object's name. A hole may be there several times.
 *
 * Threads: no state.
 */
#ifndef LORAMILL_WORKER_URL_TEMPLATE_H
#define LORAMILL_WORKER_URL_TEMPLATE_H

#include "kernels/base.h"

#define URL_HOLE_ADAPTER "{adapter}"
#define URL_HOLE_OBJECT "{object}"

/* Has it the hole, and the scheme http, https or, with `files`, file? A hole before the path is
 * refused: what fills it may be a prompt's, and must not choose who is asked and gets our
 * credentials. `name` is the property's, for the error, which shows no password. */
lm_status url_template_check(const char *name, const char *url, const char *hole, bool files,
                             struct lm_err *err);

/* The URL with its holes filled, and "/file" behind its path unless that is NULL. malloc'ed; NULL:
 * out of memory. Nothing is encoded: ids of adapters and names of objects hold characters only that
 * percent-encoding leaves alone (RFC 3986 section 2.3), and '/', which keeps its meaning. */
char *url_template_fill(const char *url, const char *hole, const char *with, const char *file);

#endif
