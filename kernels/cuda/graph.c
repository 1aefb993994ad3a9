/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph.c - a step's operations as one CUDA graph.
 *
 * Each step is captured anew, since its arguments differ (pointers, counts, grids), but a graph
 * that is ready to run is expensive to make. So those made are kept, by number of nodes: the new
 * capture's arguments are written into the kept one, which works as long as the kernels and their
 * order are the same: the next step of the same bucket, with or without LoRA. What cannot be
 * updated is made anew in its place.
 *
 * A stream is used by one thread at a time, and so are its graphs.
 */
#include "kernels/cuda/cuda_int.h"

#include <stdlib.h>

#define KEPT 24

struct kept {
    cudaGraphExec_t exec;       /* NULL: an empty place */
    size_t nodes;
    uint64_t used;              /* when last */
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

lm_status cuda_graph_begin(kn_stream *s)
{
    struct cuda_stream *st = cuda_stream_of(s);
    lm_status rc = cuda_check(st->dev, "graph_begin",
                              cudaStreamBeginCapture(st->s, cudaStreamCaptureModeThreadLocal));
    st->graphs->recording = rc == LM_OK;
    return rc;
}

/* The place of that many nodes, else an empty one, else the one that was used longest ago. */
static struct kept *place_for(struct cuda_graphs *g, size_t nodes)
{
    struct kept *best = &g->kept[0];
    for (int i = 0; i < KEPT; i++) {
        struct kept *k = &g->kept[i];
        if (k->exec && k->nodes == nodes)
            return k;
        if (best->exec && (!k->exec || k->used < best->used))
            best = k;
    }
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

lm_status cuda_graph_end(kn_stream *s)
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
        e = cudaGraphGetNodes(graph, NULL, &nodes);
    if (e == cudaSuccess && nodes > 0) {
        struct kept *k = place_for(g, nodes);
        k->used = ++g->clock;
        e = make_ready(k, graph, nodes);
        if (e == cudaSuccess)
            e = cudaGraphLaunch(k->exec, st->s);
    }
    if (graph)
        cudaGraphDestroy(graph);
    return cuda_check(st->dev, "graph_end", e);
}
