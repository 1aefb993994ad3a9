/* SPDX-License-Identifier: Apache-2.0 */
/*
 * emu.cc - the emulator's fibers: one for each thread of the block that runs.
 *
 * The scheduler goes round the fibers; each runs until it has to wait for others. Waiting is a
 * generation number that the last to arrive moves on. A round in which no fiber moved is a
 * deadlock: some threads wait for others that returned or wait elsewhere.
 */
#include "cuda_runtime_api.h"

#include <stdio.h>
#include <stdlib.h>

#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#define STACK_BYTES (96 << 10)
#define MAX_THREADS 1024
#define SMEM_MAX (232 << 10)
#define EXCHANGE_MAX 512        /* bytes that a lane hands to a warp-wide instruction */

struct copy {
    void *dst;
    const void *src;
    size_t n;
    int group;
};

/* Where a stopped fiber's registers are. swapcontext() would do everywhere, but asks the kernel
 * about signals each time: twenty times the cost. */
#ifdef __x86_64__
typedef void *context;
extern "C" void emu_switch(context *save, context *load);
__asm__(".text\n.globl emu_switch\nemu_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov (%rsi), %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void context_make(context *c, unsigned char *stack, size_t size, void (*fn)(void))
{
    void **top = (void **)(stack + size);
    *--top = NULL;              /* what fn would return to; keeps its frame 16-byte aligned */
    *--top = (void *)fn;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    *c = top;
}
#else
typedef ucontext_t context;

static void emu_switch(context *save, context *load)
{
    swapcontext(save, load);
}

static void context_make(context *c, unsigned char *stack, size_t size, void (*fn)(void))
{
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = size;
    c->uc_link = NULL;
    makecontext(c, fn, 0);
}
#endif

struct fiber {
    context ctx;
    dim3 place;
    std::vector<struct copy> copies;
    int groups, landed;         /* committed, and how many of those are done */
    bool done;
};

struct warp {
    const void *in[32];
    void *out[32];
    unsigned char in_copy[32][EXCHANGE_MAX], out_copy[32][EXCHANGE_MAX];
    int arrived;
    unsigned generation;
};

/* An mbarrier, in its 8 bytes. */
struct mbar {
    int16_t pending, arrivals;
    uint32_t phase : 1;
    int32_t bytes : 31;         /* announced, and not landed */
};
static_assert(sizeof(struct mbar) == 8, "an mbarrier has 8 bytes");

struct bulk {
    uint64_t *bar;
    int bytes;
    std::function<void()> land;
};

dim3 threadIdx, blockIdx, blockDim, gridDim;
static std::vector<struct bulk> bulks;
static struct fiber fibers[MAX_THREADS];
static struct warp warps[MAX_THREADS / 32];
static context scheduler;
static struct fiber *now;
static int n_fibers, at_barrier, n_done;
static unsigned barrier_generation;
static bool moved;
static const std::function<void()> *kernel_body;
static unsigned char *stacks;
alignas(128) static unsigned char dynamic_smem[SMEM_MAX];

unsigned char *emu_dynamic_smem(void)
{
    return dynamic_smem;
}

static void yield(void)
{
    emu_switch(&now->ctx, &scheduler);
}

void emu_barrier(void)
{
    unsigned g = barrier_generation;
    moved = true;
    if (++at_barrier + n_done == n_fibers) {
        at_barrier = 0;
        barrier_generation++;
        return;
    }
    while (barrier_generation == g)
        yield();
}

void emu_warp(const void *in, size_t in_size, void *out, size_t out_size, emu_warp_fn *fn,
              void *arg)
{
    int tid = (int)(now - fibers);
    struct warp *w = &warps[tid / 32];
    unsigned g = w->generation;
    moved = true;
    memcpy(w->in_copy[tid % 32], in, in_size);
    w->in[tid % 32] = w->in_copy[tid % 32];
    w->out[tid % 32] = w->out_copy[tid % 32];
    if (++w->arrived == 32) {
        fn(w->in, w->out, arg);
        w->arrived = 0;
        w->generation++;
    }
    while (w->generation == g)
        yield();
    memcpy(out, w->out_copy[tid % 32], out_size);
}

void emu_copy_later(void *dst, const void *src, size_t n)
{
    if ((uintptr_t)dst % 16 || (uintptr_t)src % 16) {
        fprintf(stderr, "emulator: cp.async of unaligned addresses\n");
        abort();
    }
    now->copies.push_back({ dst, src, n, now->groups });
}

void emu_copy_commit(void)
{
    now->groups++;
}

void emu_copy_wait(int left)
{
    size_t i = 0;
    std::vector<struct copy> &c = now->copies;
    for (; i < c.size() && c[i].group < now->groups - left; i++)
        if (c[i].src)
            memcpy(c[i].dst, c[i].src, c[i].n);
        else
            memset(c[i].dst, 0, c[i].n);
    c.erase(c.begin(), c.begin() + (long)i);
}

/* ---- barrier objects ------------------------------------------------------------------- */

static struct mbar mbar_get(const uint64_t *bar)
{
    struct mbar m;
    memcpy(&m, bar, sizeof m);
    return m;
}

static void mbar_put(uint64_t *bar, struct mbar m)
{
    if (m.pending == 0 && m.bytes == 0) {
        m.phase ^= 1;
        m.pending = m.arrivals;
    }
    moved = true;
    memcpy(bar, &m, sizeof m);
}

void emu_mbar_init(uint64_t *bar, int arrivals)
{
    struct mbar m = {};
    m.pending = m.arrivals = (int16_t)arrivals;
    memcpy(bar, &m, sizeof m);
}

void emu_mbar_arrive(uint64_t *bar, int expect_bytes)
{
    struct mbar m = mbar_get(bar);
    if (m.pending == 0) {
        fprintf(stderr, "emulator: more arrivals than a barrier was made for\n");
        abort();
    }
    m.pending--;
    m.bytes += expect_bytes;
    mbar_put(bar, m);
}

void emu_bulk_copy(uint64_t *bar, int bytes, bool aligned, std::function<void()> land)
{
    if (!aligned) {
        fprintf(stderr, "emulator: a bulk copy to an unaligned address\n");
        abort();
    }
    bulks.push_back({ bar, bytes, land });
}

static void land_bulks(uint64_t *bar)
{
    for (size_t i = 0; i < bulks.size();)
        if (bulks[i].bar == bar) {
            bulks[i].land();
            struct mbar m = mbar_get(bar);
            m.bytes -= bulks[i].bytes;
            bulks.erase(bulks.begin() + (long)i);
            mbar_put(bar, m);
        } else {
            i++;
        }
}

void emu_mbar_wait(uint64_t *bar, int parity)
{
    land_bulks(bar);
    while (mbar_get(bar).phase == (uint32_t)(parity & 1)) {
        yield();
        land_bulks(bar);
    }
}

static void fiber_main(void)
{
    (*kernel_body)();
    if (!now->copies.empty()) {
        fprintf(stderr, "emulator: a thread returned with copies under way\n");
        abort();
    }
    now->done = true;
    n_done++;
    moved = true;
    if (at_barrier && at_barrier + n_done == n_fibers) {
        at_barrier = 0;
        barrier_generation++;
    }
    for (;;)
        yield();
}

static void start_fiber(int i, dim3 place)
{
    struct fiber *f = &fibers[i];
    f->place = place;
    f->groups = f->landed = 0;
    f->copies.clear();
    f->done = false;
    context_make(&f->ctx, stacks + (size_t)i * STACK_BYTES, STACK_BYTES, fiber_main);
}

static void run_block(dim3 block, dim3 dim)
{
    blockIdx = block;
    blockDim = dim;
    n_fibers = (int)(dim.x * dim.y * dim.z);
    at_barrier = n_done = 0;
    memset(dynamic_smem, 0xff, sizeof dynamic_smem);    /* NaNs: nobody relies on what was there */
    for (int i = 0; i < n_fibers; i++)
        start_fiber(i, dim3((unsigned)i % dim.x, (unsigned)i / dim.x % dim.y,
                            (unsigned)i / dim.x / dim.y));
    for (int w = 0; w < (n_fibers + 31) / 32; w++)
        warps[w].arrived = 0;
    while (n_done < n_fibers) {
        moved = false;
        for (int i = 0; i < n_fibers; i++) {
            now = &fibers[i];
            threadIdx = now->place;
            if (!now->done)
                emu_switch(&scheduler, &now->ctx);
        }
        if (!moved) {
            fprintf(stderr, "emulator: block %u,%u,%u: %d threads wait for others in vain\n",
                    block.x, block.y, block.z, n_fibers - n_done);
            abort();
        }
    }
    if (!bulks.empty()) {
        fprintf(stderr, "emulator: a block ended with bulk copies under way\n");
        abort();
    }
}

void emu_launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &body)
{
    if (smem > SMEM_MAX || block.x * block.y * block.z > MAX_THREADS) {
        fprintf(stderr, "emulator: %zu bytes of shared memory, %u threads\n", smem, block.x);
        abort();
    }
    if (!stacks)
        stacks = (unsigned char *)malloc((size_t)MAX_THREADS * STACK_BYTES);
    kernel_body = &body;
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++)
                run_block(dim3(x, y, z), block);
}
