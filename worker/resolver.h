/* SPDX-License-Identifier: Apache-2.0 */
/*
 * resolver.h - a transfer does not wait for a name that nobody answers for.
 *
 * libcurl has a thread of its own wait in getaddrinfo(), which nothing can interrupt. A transfer
 * that ends before (its time is over, the worker's is) joins that thread: for as long as the
 * system's resolver tries, 10 to 40 seconds, whatever CURLOPT_CONNECTTIMEOUT_MS and the progress
 * callback say, and a worker that was told to end would end so much later. With
 * CURLOPT_QUICK_EXIT the thread is left to itself instead: it frees what it has when its answer
 * comes, or ends with the process. A transfer is tried again after a pause only, so there are
 * few of them.
 */
#ifndef LORAMILL_WORKER_RESOLVER_H
#define LORAMILL_WORKER_RESOLVER_H

#include <curl/curl.h>

/* For every transfer of a worker. Older libraries join, and hold the worker's end up. */
static inline CURLcode resolver_let_go(CURL *curl)
{
#if LIBCURL_VERSION_NUM >= 0x075700
    return curl_easy_setopt(curl, CURLOPT_QUICK_EXIT, 1L);
#else
    (void)curl;
    return CURLE_OK;
#endif
}

#endif
