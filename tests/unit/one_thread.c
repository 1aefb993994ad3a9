/* SPDX-License-Identifier: Apache-2.0 */
/*
 * one_thread.c - linked, with --wrap=pthread_create, into every test program that the Makefile's
 * THREADED does not name: what of loramill would start a thread there ends the program instead.
 *
 * ThreadSanitizer's builds leave these programs out, so the claim that they have no second thread
 * is held against every other build. A library's own threads (OpenBLAS has some) are not judged;
 * where such a thread calls back into loramill, the program belongs on the list as well.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
                          void *arg);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
                          void *arg)
{
    (void)thread;
    (void)attr;
    (void)start;
    (void)arg;
    fprintf(stderr, "this program starts a thread: put its name on THREADED in the Makefile\n");
    abort();
}
