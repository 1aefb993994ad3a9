/* SPDX-License-Identifier: Apache-2.0 */
/*
 * safetensors_build.h - makes safetensors files, right and wrong ones, for tests.
 *
 * st_image() joins any header text with any data, so that every rule of the format can be broken
 * by itself. struct st_writer collects float32 tensors and writes a correct file.
 */
#ifndef LORAMILL_TESTS_SAFETENSORS_BUILD_H
#define LORAMILL_TESTS_SAFETENSORS_BUILD_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* malloc'd file of exactly *n bytes: length, header, `data_n` bytes of 0, 1, 2, ... */
static inline uint8_t *st_image(const char *header, size_t data_n, size_t *n)
{
    size_t h = strlen(header);
    uint8_t *p = malloc(8 + h + data_n);
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)((uint64_t)h >> (8 * i));
    memcpy(p + 8, header, h);
    for (size_t i = 0; i < data_n; i++)
        p[8 + h + i] = (uint8_t)i;
    *n = 8 + h + data_n;
    return p;
}

struct st_writer {
    char header[1 << 16];
    size_t h;
    float *data;
    size_t n;                   /* floats */
};

static inline void st_writer_add(struct st_writer *w, const char *name, const char *dtype,
                                 int rows, int cols, float value)
{
    size_t count = (size_t)rows * (size_t)cols, begin = w->n * sizeof(float);
    w->data = realloc(w->data, (w->n + count) * sizeof(float));
    for (size_t i = 0; i < count; i++)
        w->data[w->n + i] = value + (float)(i % 7) * 0.125f;
    w->n += count;
    if (strcmp(dtype, "F32") != 0)      /* same bytes, another claim: twice as many halves */
        cols *= 2;
    w->h += (size_t)snprintf(w->header + w->h, sizeof w->header - w->h,
                             "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[%d,%d],"
                             "\"data_offsets\":[%zu,%zu]}",
                             w->h ? ',' : '{', name, dtype, rows, cols, begin,
                             w->n * sizeof(float));
}

/* Writes the file and empties the writer. */
static inline void st_writer_save(struct st_writer *w, const char *path)
{
    FILE *f = fopen(path, "wb");
    snprintf(w->header + w->h, sizeof w->header - w->h, w->h ? "}" : "{}");
    uint64_t h = strlen(w->header);
    if (!f || fwrite(&h, 8, 1, f) != 1 || fwrite(w->header, h, 1, f) != 1 ||
        (w->n && fwrite(w->data, sizeof(float), w->n, f) != w->n) || fclose(f) != 0)
        abort();
    free(w->data);
    memset(w, 0, sizeof *w);
}

static inline void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(text, 1, strlen(text), f) != strlen(text) || fclose(f) != 0)
        abort();
}

#endif
