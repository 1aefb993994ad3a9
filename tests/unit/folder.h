/* SPDX-License-Identifier: Apache-2.0 */
/*
 * folder.h - a folder of a test's own, `dir`, which is there from make_dir() to remove_dir(), and
 * files.
 */
#ifndef LORAMILL_TESTS_UNIT_FOLDER_H
#define LORAMILL_TESTS_UNIT_FOLDER_H

#include <stdio.h>
#include <stdlib.h>

static char dir[64];

/* For cmocka's setup of a group. */
static inline int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/loramill-test-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

/* With all that is in it. */
static inline int remove_dir(void **state)
{
    (void)state;
    char command[sizeof dir + 8];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

static inline void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f))
        abort();
}

#endif
