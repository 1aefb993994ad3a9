/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tree.c - see tree.h. Insertion goes down to a leaf and rotates up while the parent weighs less;
 * removal rotates down until there is at most one child, and cuts.
 */
#include "engine/tree.h"

void tree_init(struct tree *t, tree_before *before)
{
    *t = (struct tree){ .before = before, .state = 2463534242u };
}

/* xorshift32: never 0, so a weight of 0 can mean "in no tree". */
static uint32_t next_weight(struct tree *t)
{
    t->state ^= t->state << 13;
    t->state ^= t->state >> 17;
    t->state ^= t->state << 5;
    return t->state;
}

/* Where the tree points at this node. */
static struct tree_node **link_to(struct tree *t, const struct tree_node *n)
{
    if (!n->parent)
        return &t->root;
    return n->parent->left == n ? &n->parent->left : &n->parent->right;
}

/* n's child `c` takes its place, n becomes c's child. */
static void rotate_up(struct tree *t, struct tree_node *n, struct tree_node *c)
{
    struct tree_node *between;
    *link_to(t, n) = c;
    c->parent = n->parent;
    if (n->left == c) {
        between = n->left = c->right;
        c->right = n;
    } else {
        between = n->right = c->left;
        c->left = n;
    }
    if (between)
        between->parent = n;
    n->parent = c;
}

void tree_insert(struct tree *t, struct tree_node *n)
{
    struct tree_node **at = &t->root, *parent = NULL;
    bool first = true;
    while (*at) {
        parent = *at;
        if (t->before(n, parent)) {
            at = &parent->left;
        } else {
            at = &parent->right;
            first = false;
        }
    }
    *n = (struct tree_node){ .parent = parent, .weight = next_weight(t) };
    *at = n;
    t->n++;
    if (first)
        t->first = n;
    while (n->parent && n->parent->weight < n->weight)
        rotate_up(t, n->parent, n);
}

void tree_remove(struct tree *t, struct tree_node *n)
{
    if (t->first == n)
        t->first = tree_next(n);
    while (n->left && n->right)
        rotate_up(t, n, n->left->weight > n->right->weight ? n->left : n->right);
    struct tree_node *child = n->left ? n->left : n->right;
    *link_to(t, n) = child;
    if (child)
        child->parent = n->parent;
    *n = (struct tree_node){ 0 };
    t->n--;
}

struct tree_node *tree_last(const struct tree *t)
{
    struct tree_node *n = t->root;
    while (n && n->right)
        n = n->right;
    return n;
}

struct tree_node *tree_next(const struct tree_node *n)
{
    if (n->right) {
        n = n->right;
        while (n->left)
            n = n->left;
        return (struct tree_node *)(uintptr_t)n;
    }
    while (n->parent && n->parent->right == n)
        n = n->parent;
    return n->parent;
}

struct tree_node *tree_prev(const struct tree_node *n)
{
    if (n->left) {
        n = n->left;
        while (n->right)
            n = n->right;
        return (struct tree_node *)(uintptr_t)n;
    }
    while (n->parent && n->parent->left == n)
        n = n->parent;
    return n->parent;
}

bool tree_ok(const struct tree *t)
{
    int n = 0;
    const struct tree_node *prev = NULL;
    for (const struct tree_node *a = t->first; a; prev = a, a = tree_next(a), n++) {
        if (prev ? !t->before(prev, a) || t->before(a, prev) || tree_prev(a) != prev
                 : tree_prev(a) != NULL)
            return false;
        if ((a->left && (a->left->parent != a || a->left->weight > a->weight)) ||
            (a->right && (a->right->parent != a || a->right->weight > a->weight)))
            return false;
    }
    return n == t->n && tree_last(t) == prev && (!t->root || !t->root->parent);
}
