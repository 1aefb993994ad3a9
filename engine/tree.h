/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tree.h - ordered sets whose nodes are embedded in what they hold.
 *
 * A treap: a binary search tree by the owner's order, a heap by random weights, so every operation
 * takes O(log n) expected whatever order things come in, and none allocates. Nodes know their
 * parents, so a const walk needs no stack and a node can be removed without a search.
 *
 * The order must be strict and total. What it looks at may change while a node is in only if the
 * node keeps its place between its neighbours.
 *
 * Ownership: none; the tree never touches what its nodes are embedded in. Threads: the owner's.
 */
#ifndef LORAMILL_ENGINE_TREE_H
#define LORAMILL_ENGINE_TREE_H

#include <stddef.h>

#include "kernels/base.h"

struct tree_node {
    struct tree_node *parent, *left, *right;
    uint32_t weight;            /* 0: in no tree */
};

/* True when a goes before b. */
typedef bool tree_before(const struct tree_node *a, const struct tree_node *b);

struct tree {
    struct tree_node *root, *first;
    tree_before *before;
    uint32_t state;             /* of the weights' generator */
    int n;
};

void tree_init(struct tree *t, tree_before *before);
void tree_insert(struct tree *t, struct tree_node *n);
void tree_remove(struct tree *t, struct tree_node *n);

static inline bool tree_has(const struct tree_node *n)
{
    return n->weight != 0;
}

static inline struct tree_node *tree_first(const struct tree *t)
{
    return t->first;
}

struct tree_node *tree_last(const struct tree *t);
struct tree_node *tree_next(const struct tree_node *n);
struct tree_node *tree_prev(const struct tree_node *n);

/* Order, weights and links; for tests and checking builds, O(n). */
bool tree_ok(const struct tree *t);

/* What a node is embedded in; NULL stays NULL. */
#define TREE_OF(node, type, member)                                                            \
    ((type *)tree_owner((node), offsetof(type, member)))

static inline void *tree_owner(const struct tree_node *n, size_t offset)
{
    return n ? (char *)(uintptr_t)n - offset : NULL;
}

#endif
