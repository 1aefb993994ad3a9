/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_upload.c - what several threads bring to the device in pieces is what one call brings whole;
 * what fails is told once, by name, and stops the others.
 *
 * The CPU backend is the device. Two files of a set, three dtypes, whole tensors, rows and columns
 * of them; sizes that pieces don't divide.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/upload.h"
#include "tests/unit/safetensors_build.h"

#define ROWS 67
#define COLS 48                 /* of float32; halves have twice as many */
#define INDEX                                                                                  \
    "{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"one.safetensors\","                    \
    "\"c\":\"two.safetensors\",\"d\":\"two.safetensors\"}}"

struct world {
    char dir[64], path[3][96];
    kn_device *dev;
    safetensors *files;
};

static void must(lm_status st, const struct lm_err *err)
{
    if (st != LM_OK)
        fail_msg("status %d: %s", st, err->msg);
}

static void world_init(struct world *w)
{
    static const char *const names[] = { "one.safetensors", "two.safetensors",
                                         "model.safetensors.index.json" };
    struct st_writer one = { 0 }, two = { 0 };
    struct lm_err err = { 0 };
    struct kn_open_params p = { .threads = 1 };
    memset(w, 0, sizeof *w);
    char dir[] = "/tmp/upload-XXXXXX";
    assert_non_null(mkdtemp(dir));
    snprintf(w->dir, sizeof w->dir, "%s", dir);
    for (int i = 0; i < 3; i++)
        snprintf(w->path[i], sizeof w->path[i], "%s/%s", dir, names[i]);
    st_writer_add(&one, "a", "F32", ROWS, COLS, 1);
    st_writer_add(&one, "b", "BF16", ROWS, COLS, 2);
    st_writer_add(&two, "c", "F16", ROWS, COLS, 3);
    st_writer_add(&two, "d", "F32", ROWS, COLS, -4);
    st_writer_save(&one, w->path[0]);
    st_writer_save(&two, w->path[1]);
    write_text(w->path[2], INDEX);
    must(kn_open("cpu", &p, &w->dev, &err), &err);
    must(safetensors_open_model(w->dir, &w->files, &err), &err);
}

static void world_release(struct world *w)
{
    safetensors_close(w->files);
    kn_close(w->dev);
    for (int i = 0; i < 3; i++)
        unlink(w->path[i]);
    rmdir(w->dir);
    upload_force(0, 0);
}

static kn_mat *matrix(struct world *w, enum kn_dtype t, int rows, int cols)
{
    struct lm_err err = { 0 };
    kn_mat *m = NULL;
    must(kn_mat_new(w->dev, t, rows, cols, &m, &err), &err);
    return m;
}

static void assert_same(struct world *w, const kn_mat *a, const kn_mat *b)
{
    struct lm_err err = { 0 };
    kn_stream *s = NULL;
    size_t n = kn_mat_bytes(a);
    void *x = malloc(n), *y = malloc(n);
    assert_int_equal(kn_mat_bytes(b), n);
    must(kn_stream_new(w->dev, &s, &err), &err);
    assert_int_equal(kn_mat_save(s, x, a), LM_OK);
    assert_int_equal(kn_mat_save(s, y, b), LM_OK);
    must(kn_stream_sync(s, &err), &err);
    assert_memory_equal(x, y, n);
    kn_stream_free(s);
    free(x);
    free(y);
}

/* The rectangles of one load: four tensors on top of each other, then a corner of one. */
static void add_all(struct world *w, upload *u, kn_mat *whole, kn_mat *corner)
{
    static const char *const names[] = { "d", "c", "b", "a" };
    struct lm_err err = { 0 };
    for (int i = 0; i < 4; i++) {
        const struct st_tensor *t = safetensors_find(w->files, names[i]);
        struct upload_rect r = { .to = whole, .row0 = i * ROWS, .from = t, .rows = ROWS,
                                 .cols = COLS };
        must(upload_add(u, &r, &err), &err);
    }
    struct upload_rect cut = { .to = corner, .row0 = 3, .from = safetensors_find(w->files, "b"),
                               .row = 11, .rows = 40, .col = 16, .cols = 32 };
    must(upload_add(u, &cut, &err), &err);
}

static void load_directly(struct world *w, kn_mat *whole, kn_mat *corner)
{
    static const char *const names[] = { "d", "c", "b", "a" };
    struct lm_err err = { 0 };
    const struct st_tensor *t;
    for (int i = 0; i < 4; i++) {
        t = safetensors_find(w->files, names[i]);
        must(kn_mat_upload(whole, i * ROWS, 0, ROWS, COLS, t->data, t->dtype, (size_t)t->shape[1],
                           &err), &err);
    }
    t = safetensors_find(w->files, "b");
    must(kn_mat_upload(corner, 3, 0, 40, 32, (const uint16_t *)t->data + 11 * t->shape[1] + 16,
                       t->dtype, (size_t)t->shape[1], &err), &err);
}

static void the_same_in_pieces(void **state)
{
    (void)state;
    static const struct {
        int threads;
        size_t piece;
    } tries[] = { { 0, 0 }, { 1, 1 }, { 2, 1000 }, { 4, 200 }, { 16, 1 } };
    struct lm_err err = { 0 };
    struct world w;
    world_init(&w);
    kn_mat *whole = matrix(&w, KN_F32, 4 * ROWS, COLS), *corner = matrix(&w, KN_BF16, 50, 32);
    load_directly(&w, whole, corner);
    for (size_t i = 0; i < LM_COUNT(tries); i++) {
        kn_mat *m = matrix(&w, KN_F32, 4 * ROWS, COLS), *c = matrix(&w, KN_BF16, 50, 32);
        upload *u = NULL;
        upload_force(tries[i].threads, tries[i].piece);
        must(upload_new(w.files, w.dev, &u, &err), &err);
        add_all(&w, u, m, c);
        upload_start(u);
        must(upload_wait(u, &err), &err);
        upload_free(u);
        assert_same(&w, whole, m);
        assert_same(&w, corner, c);
        kn_mat_free(m);
        kn_mat_free(c);
    }
    kn_mat_free(whole);
    kn_mat_free(corner);
    world_release(&w);
}

/* A file that is cut after it was opened is an error, not a signal; the others stop. */
static void a_shorter_file(void **state)
{
    (void)state;
    struct world w;
    struct lm_err err = { 0 };
    world_init(&w);
    assert_int_equal(truncate(w.path[1], 600), 0);
    for (int threads = 1; threads <= 4; threads += 3) {
        kn_mat *m = matrix(&w, KN_F32, 4 * ROWS, COLS), *c = matrix(&w, KN_BF16, 50, 32);
        upload *u = NULL;
        upload_force(threads, 500);
        must(upload_new(w.files, w.dev, &u, &err), &err);
        add_all(&w, u, m, c);
        upload_start(u);
        assert_int_equal(upload_wait(u, &err), LM_IO);
        assert_non_null(strstr(err.msg, "two.safetensors: tensor c: the file has become shorter"));
        upload_free(u);
        kn_mat_free(m);
        kn_mat_free(c);
    }
    world_release(&w);
}

/* What kn_mat_upload() refuses is told with the tensor's name. */
static void what_the_device_refuses(void **state)
{
    (void)state;
    struct world w;
    struct lm_err err = { 0 };
    world_init(&w);
    for (int n = 0; n < 20; n++) {
        kn_mat *m = matrix(&w, KN_E4M3, 2 * ROWS, 2 * COLS);
        upload *u = NULL;
        upload_force(3, 700);
        must(upload_new(w.files, w.dev, &u, &err), &err);
        struct upload_rect r = { .to = m, .from = safetensors_find(w.files, "b"), .rows = ROWS,
                                 .cols = 2 * COLS };
        must(upload_add(u, &r, &err), &err);
        r.row0 = ROWS;
        r.cols = COLS;          /* not whole rows */
        must(upload_add(u, &r, &err), &err);
        upload_start(u);
        assert_int_equal(upload_wait(u, &err), LM_UNSUPPORTED);
        assert_non_null(strstr(err.msg, "tensor 'b': a matrix in E4M3 is uploaded by whole rows"));
        upload_free(u);
        kn_mat_free(m);
    }
    world_release(&w);
}

/* Closing with threads under way, before anybody waited. */
static void left_alone(void **state)
{
    (void)state;
    struct world w;
    struct lm_err err = { 0 };
    world_init(&w);
    for (int n = 0; n < 50; n++) {
        kn_mat *m = matrix(&w, KN_F32, 4 * ROWS, COLS), *c = matrix(&w, KN_BF16, 50, 32);
        upload *u = NULL;
        upload_force(4, 1);
        must(upload_new(w.files, w.dev, &u, &err), &err);
        add_all(&w, u, m, c);
        if (n % 3)
            upload_start(u);
        upload_free(u);
        kn_mat_free(m);
        kn_mat_free(c);
    }
    world_release(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_in_pieces),
        cmocka_unit_test(a_shorter_file),
        cmocka_unit_test(what_the_device_refuses),
        cmocka_unit_test(left_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
