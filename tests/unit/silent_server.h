/* SPDX-License-Identifier: Apache-2.0 */
/*
 * silent_server.h - a server that never says a word, for tests of who waits for one.
 */
#ifndef LORAMILL_TESTS_UNIT_SILENT_SERVER_H
#define LORAMILL_TESTS_UNIT_SILENT_SERVER_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

/* Connections are taken by the system, and nobody reads from them. Returns the socket, to close. */
static int listen_silently(int *port)
{
    struct sockaddr_in at = { .sin_family = AF_INET };
    socklen_t len = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)&at, &len))
        abort();
    *port = ntohs(at.sin_port);
    return fd;
}

/* The same, with its URL. */
static inline int listen_silently_at(char *url, size_t size)
{
    int port, fd = listen_silently(&port);
    snprintf(url, size, "http://127.0.0.1:%d", port);
    return fd;
}

#endif
