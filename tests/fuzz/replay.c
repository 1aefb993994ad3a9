/* SPDX-License-Identifier: Apache-2.0 */
/*
 * replay.c - feeds stored inputs to a fuzz target without a fuzzer.
 *
 * `fuzz_NAME DIR|FILE...` calls LLVMFuzzerTestOneInput() on every file and prints one TAP line a
 * file, so that `make test` replays each corpus under any sanitizer. No input is a failure.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        printf("not ok - %s: cannot be opened\n", path);
        return -1;
    }
    struct stat sb;
    if (fstat(fileno(f), &sb) != 0 || !S_ISREG(sb.st_mode)) {
        fclose(f);
        return 0;
    }
    size_t size = (size_t)sb.st_size;
    uint8_t *data = malloc(size ? size : 1);    /* exact size: ASan sees each overread */
    size_t got = data ? fread(data, 1, size, f) : 0;
    fclose(f);
    if (got == size && data)
        LLVMFuzzerTestOneInput(data, size);
    free(data);
    printf("%s - %s\n", got == size ? "ok" : "not ok", path);
    return 1;
}

static int replay_path(const char *path)
{
    DIR *d = opendir(path);
    if (!d)
        return replay_file(path);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));) {
        char file[4096];
        if (e->d_name[0] == '.')
            continue;
        snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        n += replay_file(file) > 0;
    }
    closedir(d);
    return n;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    int n = 0;
    for (int i = 1; i < argc; i++)
        n += replay_path(argv[i]) > 0;
    if (n == 0)
        printf("not ok - no input\n");
    return n == 0;
}
