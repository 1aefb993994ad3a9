/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph.c - a step's operations as one CUDA graph, recorded once and run as often as it fits.
 *
 * A graph holds all that its kernels were told: addresses, counts, grids. The caller names that by
 * a key; a step with the key of one that was recorded is a single launch. What differs from step to
 * step lies in device memory, at the same addresses.
 *
 * An executable graph is expensive to make, cheap to run and not free to keep, so there are at most
 * KEPT. Once there are, a new recording takes the place of the one used longest ago: its arguments
 * are written into the old executable where the kernels and their order are the same, which costs
 * a fraction of making another. Where the device has no room for one, that is no failure: nothing
 * is run, the one used longest ago is given up, and the caller enqueues its operations singly.
 *
 * A stream is used by one thread at a time, and so are its graphs.
 */
#include "kernels/cuda/cuda_int.h"

#include <stdlib.h>
#include <string.h>

#define KEPT 48

struct kept {
    cudaGraphExec_t exec;       /* NULL: an empty place */
    size_t nodes, key_bytes;
    uint64_t used;              /* when last */
    unsigned char key[KN_GRAPH_KEY_BYTES];
};

struct cuda_graphs {
    bool recording, told;       /* told: of no room, in the log */
    uint64_t clock;
    struct kept kept[KEPT];
};

static struct cuda_graph_counts counts;     /* of the process, atomic */

static void count(uint64_t *what)
{
    __atomic_fetch_add(what, 1, __ATOMIC_RELAXED);
}

void cuda_graph_count(struct cuda_graph_counts *out)
{
    out->recorded = __atomic_load_n(&counts.recorded, __ATOMIC_RELAXED);
    out->run_again = __atomic_load_n(&counts.run_again, __ATOMIC_RELAXED);
    out->evicted = __atomic_load_n(&counts.evicted, __ATOMIC_RELAXED);
}

struct cuda_graphs *cuda_graphs_new(void)
{
    return lm_calloc(1, sizeof(struct cuda_graphs));
}

void cuda_graphs_free(struct cuda_graphs *g)
{
    for (int i = 0; g && i < KEPT; i++)
        if (g->kept[i].exec)
            cudaGraphExecDestroy(g->kept[i].exec);
    free(g);
}

/* The bucket, but for the few rows that each row more costs. */
int cuda_graph_rows(kn_device *dev, int n)
{
    (void)dev;
    return n <= 8 ? n : cuda_bucket(n);
}

static struct kept *find(struct cuda_graphs *g, const void *key, size_t n)
{
    for (int i = 0; i < KEPT; i++) {
        struct kept *k = &g->kept[i];
        if (k->exec && k->key_bytes == n && !memcmp(k->key, key, n))
            return k;
    }
    return NULL;
}

lm_status cuda_graph_run(kn_stream *s, const void *key, size_t n)
{
    struct cuda_stream *st = cuda_stream_of(s);
    struct kept *k = find(st->graphs, key, n);
    if (!k)
        return LM_NOT_FOUND;
    k->used = ++st->graphs->clock;
    count(&counts.run_again);
    return cuda_check(st->dev, "graph_run", cudaGraphLaunch(k->exec, st->s));
}

/* Ends the recording; what was recorded is the caller's to destroy, and has not run: so what comes
 * next on the stream still may be the first behind a copy. */
static cudaError_t end_capture(struct cuda_stream *st, cudaGraph_t *graph)
{
    st->graphs->recording = false;
    st->copied = true;
    *graph = NULL;
    return cudaStreamEndCapture(st->s, graph);
}

static cudaError_t abandon(struct cuda_stream *st)
{
    cudaGraph_t graph;
    cudaError_t e = end_capture(st, &graph);
    if (graph)
        cudaGraphDestroy(graph);
    return e;
}

lm_status cuda_graph_begin(kn_stream *s)
{
    struct cuda_stream *st = cuda_stream_of(s);
    cudaError_t e = cudaStreamBeginCapture(st->s, cudaStreamCaptureModeThreadLocal);
    lm_status rc = cuda_check(st->dev, "graph_begin", e);
    st->graphs->recording = e == cudaSuccess;
    if (rc != LM_OK && st->graphs->recording)
        abandon(st);            /* another thread has seen the device fail */
    return rc;
}

static struct kept *used_longest_ago(struct cuda_graphs *g)
{
    struct kept *best = NULL;
    for (int i = 0; i < KEPT; i++)
        if (g->kept[i].exec && (!best || g->kept[i].used < best->used))
            best = &g->kept[i];
    return best;
}

static void give_up(struct kept *k)
{
    if (k && k->exec)
        cudaGraphExecDestroy(k->exec);
    if (k)
        k->exec = NULL;
}

/* That of the key, else an empty place, else the one that was used longest ago. */
static struct kept *place_for(struct cuda_graphs *g, const void *key, size_t n)
{
    struct kept *best = find(g, key, n);
    for (int i = 0; i < KEPT && !best; i++)
        if (!g->kept[i].exec)
            best = &g->kept[i];
    if (best)
        return best;
    count(&counts.evicted);
    return used_longest_ago(g);
}

/* Ready to be launched without another allocation; or an empty place. */
static cudaError_t make_ready(struct kept *k, cudaGraph_t graph, size_t nodes, cudaStream_t s)
{
    if (k->exec && k->nodes == nodes) {
        cudaGraphExecUpdateResultInfo info;
        if (cudaGraphExecUpdate(k->exec, graph, &info) == cudaSuccess)
            return cudaSuccess;
        cudaGetLastError();     /* other kernels: not an error */
    }
    give_up(k);
    k->nodes = nodes;
    cudaError_t e = cudaGraphInstantiate(&k->exec, graph, 0);
    if (e == cudaSuccess)
        e = cudaGraphUpload(k->exec, s);
    if (e != cudaSuccess)
        give_up(k);
    return e;
}

static lm_status no_room(struct cuda_stream *st)
{
    cudaGetLastError();         /* or it would be the next call's */
    give_up(used_longest_ago(st->graphs));
    if (!st->graphs->told)
        lm_log(LM_WARN, "kernels", "CUDA device %d: no memory to keep a recorded step: some steps "
               "run piece by piece; a smaller pool leaves more", st->dev->index);
    st->graphs->told = true;
    return cuda_check(st->dev, "graph_end", cudaSuccess) == LM_OK ? LM_NOMEM : LM_DEVICE;
}

static cudaError_t keep(struct cuda_stream *st, cudaGraph_t graph, const void *key, size_t n,
                        struct kept **out)
{
    struct cuda_graphs *g = st->graphs;
    size_t nodes = 0;
    cudaError_t e = cudaGraphGetNodes(graph, NULL, &nodes);
    if (e != cudaSuccess || nodes == 0)
        return e;
    struct kept *k = place_for(g, key, n);
    e = make_ready(k, graph, nodes, st->s);
    if (e != cudaSuccess)
        return e;
    k->used = ++g->clock;
    k->key_bytes = n;
    memcpy(k->key, key, n);
    count(&counts.recorded);
    *out = k;
    return cudaSuccess;
}

lm_status cuda_graph_end(kn_stream *s, const void *key, size_t n)
{
    struct cuda_stream *st = cuda_stream_of(s);
    struct kept *k = NULL;
    cudaGraph_t graph;
    if (!st->graphs->recording)
        return cuda_refuse("graph_end", "nothing is being recorded");
    if (!key)
        return cuda_check(st->dev, "graph_end", abandon(st));
    cudaError_t e = end_capture(st, &graph);
    if (e == cudaSuccess)
        e = n > KN_GRAPH_KEY_BYTES ? cudaErrorInvalidValue : keep(st, graph, key, n, &k);
    if (graph)
        cudaGraphDestroy(graph);
    if (e == cudaErrorMemoryAllocation)
        return no_room(st);
    if (k) {
        st->copied = false;
        e = cudaGraphLaunch(k->exec, st->s);
    }
    return cuda_check(st->dev, "graph_end", e);
}
