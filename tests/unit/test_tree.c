/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tree.c - random insertions and removals against a sorted array.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/tree.h"

#define RND_SEED 88172645463325252u
#include "rnd.h"

#define MAX 600

struct thing {
    int key;
    int id;
    struct tree_node node;
};

static bool before(const struct tree_node *a, const struct tree_node *b)
{
    const struct thing *x = TREE_OF(a, struct thing, node), *y = TREE_OF(b, struct thing, node);
    return x->key != y->key ? x->key < y->key : x->id < y->id;
}

/* The reference: pointers in order. */
static struct thing *sorted[MAX];
static int n_sorted;

static int place(const struct thing *t)
{
    int i = 0;
    while (i < n_sorted && before(&sorted[i]->node, &t->node))
        i++;
    return i;
}

static void model_insert(struct thing *t)
{
    int i = place(t);
    memmove(sorted + i + 1, sorted + i, (size_t)(n_sorted - i) * sizeof *sorted);
    sorted[i] = t;
    n_sorted++;
}

static void model_remove(const struct thing *t)
{
    int i = place(t);
    assert_ptr_equal(sorted[i], t);
    n_sorted--;
    memmove(sorted + i, sorted + i + 1, (size_t)(n_sorted - i) * sizeof *sorted);
}

static void compare(const struct tree *t)
{
    int i = 0;
    assert_true(tree_ok(t));
    assert_int_equal(t->n, n_sorted);
    for (const struct tree_node *a = tree_first(t); a; a = tree_next(a))
        assert_ptr_equal(TREE_OF(a, struct thing, node), sorted[i++]);
    assert_int_equal(i, n_sorted);
    for (const struct tree_node *a = tree_last(t); a; a = tree_prev(a))
        assert_ptr_equal(TREE_OF(a, struct thing, node), sorted[--i]);
    assert_int_equal(i, 0);
}

static void equals_a_sorted_array(void **state)
{
    (void)state;
    static struct thing thing[MAX];
    struct tree t;
    tree_init(&t, before);
    n_sorted = 0;
    for (int i = 0; i < MAX; i++)
        thing[i].id = i;
    for (int step = 0; step < 60000; step++) {
        struct thing *x = &thing[rnd(MAX)];
        if (tree_has(&x->node)) {
            tree_remove(&t, &x->node);
            model_remove(x);
        } else {
            x->key = rnd(100);
            model_insert(x);
            tree_insert(&t, &x->node);
        }
        if (step % 50 == 0)
            compare(&t);
    }
    while (n_sorted > 0) {
        struct thing *x = sorted[rnd(n_sorted)];
        tree_remove(&t, &x->node);
        model_remove(x);
        assert_false(tree_has(&x->node));
    }
    compare(&t);
    assert_null(tree_first(&t));
}

static int depth(const struct tree_node *n)
{
    if (!n)
        return 0;
    int left = depth(n->left), right = depth(n->right);
    return 1 + LM_MAX(left, right);
}

/* Random weights: the expected depth is near 2 ln n, and 5 log2 n has odds beyond reach. */
static void stays_shallow_in_any_order(void **state)
{
    (void)state;
    enum { N = 100000 };
    for (int order = 0; order < 3; order++) {
        struct thing *thing = calloc(N, sizeof *thing);
        struct tree t;
        assert_non_null(thing);
        tree_init(&t, before);
        for (int i = 0; i < N; i++) {
            thing[i].id = i;
            thing[i].key = order == 0 ? i : order == 1 ? -i : rnd(N);
            tree_insert(&t, &thing[i].node);
        }
        assert_true(tree_ok(&t));
        assert_true(depth(t.root) < (int)(5 * log2(N)));
        free(thing);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_a_sorted_array),
        cmocka_unit_test(stays_shallow_in_any_order),
    };
    return cmocka_run_group_tests_name("tree", tests, NULL, NULL);
}
