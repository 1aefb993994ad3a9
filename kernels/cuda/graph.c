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
 * a fraction of making another.
 *
 * A stream is used by one thread at a time, and so are its graphs.
 */
#include "kernels/cuda/cuda_int.h"

#include <stdlib.h>
#include <string.h>

#define KEPT 48
#define KEY_BYTES 512

struct kept {
    cudaGraphExec_t exec;       /* NULL: an empty place */
    size_t nodes, key_bytes;
    uint64_t used;              /* when last */
    unsigned char key[KEY_BYTES];
};

struct cuda_graphs {
    bool recording;
    uint64_t clock;
    struct kept kept[KEPT];
};

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
    return cuda_check(st->dev, "graph_run", cudaGraphLaunch(k->exec, st->s));
}

lm_status cuda_graph_begin(kn_stream *s)
{
    struct cuda_stream *st = cuda_stream_of(s);
    lm_status rc = cuda_check(st->dev, "graph_begin",
                              cudaStreamBeginCapture(st->s, cudaStreamCaptureModeThreadLocal));
    st->graphs->recording = rc == LM_OK;
    return rc;
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
    best = &g->kept[0];
    for (int i = 1; i < KEPT; i++)
        if (g->kept[i].used < best->used)
            best = &g->kept[i];
    return best;
}

static cudaError_t make_ready(struct kept *k, cudaGraph_t graph, size_t nodes)
{
    if (k->exec && k->nodes == nodes) {
        cudaGraphExecUpdateResultInfo info;
        if (cudaGraphExecUpdate(k->exec, graph, &info) == cudaSuccess)
            return cudaSuccess;
        cudaGetLastError();     /* other kernels: not an error */
    }
    if (k->exec)
        cudaGraphExecDestroy(k->exec);
    k->exec = NULL;
    k->nodes = nodes;
    return cudaGraphInstantiate(&k->exec, graph, 0);
}

lm_status cuda_graph_end(kn_stream *s, const void *key, size_t n)
{
    struct cuda_stream *st = cuda_stream_of(s);
    struct cuda_graphs *g = st->graphs;
    cudaGraph_t graph = NULL;
    size_t nodes = 0;
    if (!g->recording)
        return cuda_refuse("graph_end", "nothing is being recorded");
    g->recording = false;
    cudaError_t e = cudaStreamEndCapture(st->s, &graph);
    if (e == cudaSuccess)
        e = n > KEY_BYTES ? cudaErrorInvalidValue : cudaGraphGetNodes(graph, NULL, &nodes);
    if (e == cudaSuccess && nodes > 0) {
        struct kept *k = place_for(g, key, n);
        e = make_ready(k, graph, nodes);
        k->used = ++g->clock;
        k->key_bytes = n;
        memcpy(k->key, key, n);
        if (e == cudaSuccess)
            e = cudaGraphLaunch(k->exec, st->s);
    }
    if (graph)
        cudaGraphDestroy(graph);
    return cuda_check(st->dev, "graph_end", e);
}
