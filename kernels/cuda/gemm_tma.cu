/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_tma.cu - y = x W^T for few rows of x on Hopper: W through a ring in shared memory.
 *
 * Few rows are bound by reading W once, so all that counts is that memory is never idle: not while
 * a kernel starts, not while it ends, not between two of them. One block an SM takes an equal share
 * of W's rows, in groups of 16, and stays for all of k. One warp asks the copy engine for all that
 * the ring has room for BEFORE the wait for the kernel in front: nobody on this stream writes
 * weights (kn_lora_merge wants a stream of its own for that reason). So where a norm or attention
 * is in front, the ring fills while it runs.
 *
 * The ring is more than half of an SM's shared memory, for two reasons: to have enough on its way,
 * and because of two blocks of a product that meet on one SM one is late by all its time, and the
 * product with it. The next product's block comes when this one's leaves.
 *
 * Eight warps compute. RW of them share out the groups, up to RT groups each; KW = 8 / RW share out
 * k: a stage of the ring has KW half boxes of 32 columns, one for each. So every warp takes its
 * part of every stage, whatever the share of rows is:
 *
 *     groups a block    RW    KW    columns a stage
 *     up to  4           1     8    256
 *     up to  8           2     4    128
 *     up to 16           4     2     64
 *
 * Tensor cores do the sums: W is the 16 x 16 operand, x^T the 16 x 8 one, NT of them. x comes with
 * the stages. In the end the KW sums of each element meet in the ring's place, in order. A row of y
 * is so summed in an order that depends on W's shape alone, whatever m.
 *
 * Slot s of the ring: full[s] counts the bytes of a stage, empty[s] the eight warps that have read
 * it. The fetching warp waits for empty, the others for full (hopper.cuh).
 *
 * gate_up: 16 rows of a group are 8 of gate and 8 of up in turn, which the tensor map does; the
 * product never leaves the block. Both are rounded to bf16 first, as they are where they go through
 * memory: the result is that of the two operations, to the last bit.
 */
#include "kernels/cuda/gemm_few.cuh"
#include "kernels/cuda/hopper.cuh"

#define WARPS 8                 /* that compute */
#define THREADS (WARPS * 32 + 32)
#define GROUP 16                /* rows of W */
#define RT 4                    /* groups a warp, at most */
#define MAX_SHARE (WARPS / 2 * RT)
#define BOX 64                  /* columns; 128 bytes in shared memory */
#define BOX_BYTES (BOX * GROUP * 2)
#define MAX_STAGES 16
#define RING_BYTES (130 << 10)
#define ALONE_BYTES (116 << 10) /* of which an SM has no two */
#define ALIGNED 1024            /* where a box may start, for its swizzle */
#define ROWS_MAX 32             /* of x */

struct few_tma {
    struct few_out out;
    int m, n;                   /* n: columns of y */
    int groups, share;          /* in all; a block, at most */
    int steps, stages;          /* stages in all; slots of the ring */
    int w_bytes, stage_bytes;
    bool gate_up;
};

/* Of W: all groups of a share but the last, and that one; of x. */
struct few_maps {
    struct cuda_tensor_map rest, last, x;
};

struct ring {
    unsigned char *smem;
    uint64_t *full, *empty;
};

/* Groups of a block, [first, first + n): a share's number, or one fewer. */
struct share {
    int first, n;
};

#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ static inline struct share share_of(const struct few_tma *a)
{
    const int b = (int)blockIdx.x, blocks = (int)gridDim.x;
    const int first = (int)((int64_t)a->groups * b / blocks);
    return { first, (int)((int64_t)a->groups * (b + 1) / blocks) - first };
}

/* ---- the warp that fetches ------------------------------------------------------------- */

/* A stage is three copies, each asked for by a lane of its own: an operation costs the copy engine
 * some 100 cycles, however small. */
enum { LANE_REST, LANE_LAST, LANE_X };

/* W's part of a stage: all groups but the last of a share, and that one if this block has it. */
template <int BOXES>
__device__ static inline void fetch_w(const struct few_tma *a, const struct few_maps *maps,
                                      const struct ring *r, struct share mine, int step, int slot)
{
    const int lane = (int)threadIdx.x % 32, rest = a->share - 1;
    const int height = a->gate_up ? GROUP / 2 : GROUP;
    unsigned char *stage = r->smem + slot * a->stage_bytes;
    if (lane == LANE_REST && rest > 0)
        tma_load(stage, &maps->rest, &r->full[slot], mine.first * height, step * BOXES);
    if (lane == LANE_LAST && mine.n == a->share)
        tma_load(stage + rest * BOXES * BOX_BYTES, &maps->last, &r->full[slot],
                 (mine.first + rest) * height, step * BOXES);
}

template <int NT, int BOXES>
__device__ static inline void fetch_x(const struct few_tma *a, const struct few_maps *maps,
                                      const struct ring *r, int step, int slot)
{
    if (threadIdx.x % 32 == LANE_X)
        tma_load(r->smem + slot * a->stage_bytes + a->w_bytes, &maps->x, &r->full[slot], 0,
                 step * BOXES);
}

template <int NT, int BOXES>
__device__ static inline void expect(const struct ring *r, struct share mine, int slot)
{
    if (threadIdx.x % 32 == 0)
        mbar_expect(&r->full[slot], BOXES * (mine.n * BOX_BYTES + NT * 8 * BOX * 2));
    __syncwarp();
}

/* What can be asked for ahead of the kernel in front. */
template <int NT, int BOXES>
__device__ static inline void fill_ring(const struct few_tma *a, const struct few_maps *maps,
                                        const struct ring *r, struct share mine)
{
    for (int s = 0; s < min(a->stages, a->steps); s++) {
        expect<NT, BOXES>(r, mine, s);
        fetch_w<BOXES>(a, maps, r, mine, s, s);
    }
}

template <int NT, int BOXES>
__device__ static inline void fetch(const struct few_tma *a, const struct few_maps *maps,
                                    const struct ring *r, struct share mine)
{
    for (int s = 0; s < min(a->stages, a->steps); s++)
        fetch_x<NT, BOXES>(a, maps, r, s, s);
    int slot = 0, parity = 0;
    for (int i = a->stages; i < a->steps; i++) {
        mbar_wait(&r->empty[slot], parity);
        expect<NT, BOXES>(r, mine, slot);
        fetch_w<BOXES>(a, maps, r, mine, i, slot);
        fetch_x<NT, BOXES>(a, maps, r, i, slot);
        if (++slot == a->stages)
            slot = 0, parity ^= 1;
    }
}

/* ---- the warps that compute ------------------------------------------------------------ */

/* A warp's half box of a stage: 32 columns of its groups and of x. Rows lie 128 bytes apart, their
 * pieces of 16 bytes swizzled. */
template <int NT, int RW>
__device__ static inline void use_stage(float acc[RT][NT][4], const unsigned char *stage,
                                        const struct few_tma *a, struct share mine, int rw, int kw)
{
    const int lane = (int)threadIdx.x % 32, r = lane % 8, box = kw / 2, piece = kw % 2 * 4;
    const unsigned char *x = stage + a->w_bytes + box * NT * 8 * BOX * 2 + r * 128 +
                             ((piece + lane / 8) ^ r) * 16;
    const int rest = a->share - 1;
    const unsigned char *w = stage + lane % 16 * 128;
    uint32_t b[NT][4];
#pragma unroll
    for (int j = 0; j < NT; j++)
        ldmatrix(b[j], x + j * 8 * 128);
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int group = rw + i * RW;
        if (group >= mine.n)
            break;
        const int at = group < rest ? box * rest + group : WARPS / RW / 2 * rest + box;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            uint32_t f[4];
            ldmatrix(f, w + at * BOX_BYTES + ((piece + s * 2 + lane / 16) ^ r) * 16);
#pragma unroll
            for (int j = 0; j < NT; j++)
                mma_bf16(acc[i][j], f, b[j] + s * 2);
        }
    }
}

template <int NT, int RW>
__device__ static inline void consume(float acc[RT][NT][4], const struct few_tma *a,
                                      const struct ring *r, struct share mine, int rw, int kw)
{
    int slot = 0, parity = 0;
    for (int i = 0; i < a->steps; i++) {
        mbar_wait(&r->full[slot], parity);
        use_stage<NT, RW>(acc, r->smem + slot * a->stage_bytes, a, mine, rw, kw);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            mbar_arrive(&r->empty[slot]);
        if (++slot == a->stages)
            slot = 0, parity ^= 1;
    }
}

/* Sums lie as [KW][NT * 8 rows of x][ld], ld such that a quad's rows don't meet in a bank. */
__device__ static inline int sums_ld(const struct few_tma *a)
{
    return a->share * GROUP + 4;
}

template <int NT, int RW>
__device__ static inline void put_sums(float *sums, const float acc[RT][NT][4],
                                       const struct few_tma *a, struct share mine, int rw, int kw)
{
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, ld = sums_ld(a);
#pragma unroll
    for (int i = 0; i < RT; i++) {
        if (rw + i * RW >= mine.n)
            break;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                sums[(kw * NT * 8 + j * 8 + 2 * t + (c & 1)) * ld + (rw + i * RW) * GROUP + g +
                     (c & 2) * 4] = acc[i][j][c];
    }
}

template <int NT, int KW>
__device__ static inline void finish(const struct few_tma *a, const float *sums, struct share mine)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, ld = sums_ld(a);
    const int row0 = mine.first * GROUP, rows = min(mine.n * GROUP, a->n - row0);
    for (int tok = warp; tok < a->m; tok += WARPS + 1)
        for (int row = lane; row < rows; row += 32)
            few_store(&a->out, tok, row0 + row, few_sum<NT, KW>(sums, ld, tok, row));
}

/* Rows 2i of a group are of gate, 2i + 1 the same of up. */
template <int NT, int KW>
__device__ static inline void finish_gate_up(const struct few_tma *a, const float *sums,
                                             struct share mine)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, ld = sums_ld(a);
    const int row0 = mine.first * GROUP / 2, rows = min(mine.n * GROUP / 2, a->n - row0);
    for (int tok = warp; tok < a->m; tok += WARPS + 1)
        for (int row = lane; row < rows; row += 32)
            few_store_gate_up(&a->out, tok, row0 + row, few_sum<NT, KW>(sums, ld, tok, 2 * row),
                              few_sum<NT, KW>(sums, ld, tok, 2 * row + 1));
}
#endif

template <int NT, int RW>
__global__ static void __launch_bounds__(THREADS, 1) gemm_tma(
    const __grid_constant__ struct few_tma a, const __grid_constant__ struct few_maps maps)
{
#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int KW = WARPS / RW, BOXES = KW / 2;
    DYNAMIC_SMEM(raw);
    __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    const int warp = (int)threadIdx.x / 32, rw = warp % RW, kw = warp / RW;
    const struct share mine = share_of(&a);
    const struct ring r = { raw + (-(int)smem_addr(raw) & (ALIGNED - 1)), full, empty };
    float acc[RT][NT][4] = {};
    cuda_allow_next();
    if (warp == WARPS) {
        if (threadIdx.x % 32 == 0) {
            for (int s = 0; s < a.stages; s++) {
                mbar_init(&full[s], 1);
                mbar_init(&empty[s], WARPS);
            }
            mbar_made();
        }
        __syncwarp();
        fill_ring<NT, BOXES>(&a, &maps, &r, mine);
    }
    __syncthreads();
    cuda_wait_prior();
    if (warp == WARPS)
        fetch<NT, BOXES>(&a, &maps, &r, mine);
    else
        consume<NT, RW>(acc, &a, &r, mine, rw, kw);
    __syncthreads();            /* the ring has been read: sums take its place */
    float *sums = (float *)r.smem;
    if (warp < WARPS)
        put_sums<NT, RW>(sums, acc, &a, mine, rw, kw);
    __syncthreads();
    if (a.gate_up)
        finish_gate_up<NT, KW>(&a, sums, mine);
    else
        finish<NT, KW>(&a, sums, mine);
#else
    __trap();                   /* a build without sm_90a: a failed device, no wrong tokens */
#endif
}

/* ---- host ------------------------------------------------------------------------------ */

/* Groups of W [rows, k] by boxes of columns, at (row, box). The rows of a group are neighbours, or
 * pairs of one in W's first half and one in its second. */
static bool map_w(struct cuda_stream *st, struct cuda_tensor_map *map, const struct kn_gemm *a,
                  bool pairs, int groups, int boxes)
{
    const int64_t ld = (int64_t)a->w->cols * 2, halves = pairs ? 2 : 1, rows = a->w->rows / halves;
    const struct cuda_tensor t = {
        .base = cuda_mat_of(a->w)->data,
        .size = { BOX, 1, halves, rows, a->w->cols / BOX },
        .stride = { 2, ld, rows * ld, ld, BOX * 2 },
        .box = { BOX, 1, (int)halves, groups * GROUP / (int)halves, boxes },
    };
    return cuda_tensor_map_make(st->dev, map, &t);
}

static bool map_x(struct cuda_stream *st, struct cuda_tensor_map *map, const struct kn_gemm *a,
                  int rows, int boxes)
{
    const struct cuda_tensor t = {
        .base = a->x,
        .size = { BOX, 1, 1, a->m, a->w->cols / BOX },
        .stride = { 2, a->ldx * 2, a->ldx * 2, a->ldx * 2, BOX * 2 },
        .box = { BOX, 1, 1, rows, boxes },
    };
    return cuda_tensor_map_make(st->dev, map, &t);
}

template <int NT, int RW>
static lm_status launch(struct cuda_stream *st, const struct kn_gemm *g, struct few_tma *a,
                        int blocks)
{
    constexpr int KW = WARPS / RW, BOXES = KW / 2;
    struct few_maps maps = {};
    if (!map_w(st, &maps.last, g, a->gate_up, 1, BOXES) || !map_x(st, &maps.x, g, NT * 8, BOXES) ||
        (a->share > 1 && !map_w(st, &maps.rest, g, a->gate_up, a->share - 1, BOXES)))
        return LM_UNSUPPORTED;
    const int sums = KW * NT * 8 * (a->share * GROUP + 4) * (int)sizeof(float);
    a->steps = LM_DIV_UP(g->w->cols / BOX, BOXES);
    a->w_bytes = BOXES * a->share * BOX_BYTES;
    a->stage_bytes = a->w_bytes + BOXES * NT * 8 * BOX * 2;
    a->stages = LM_MIN(RING_BYTES / a->stage_bytes, MAX_STAGES);
    const int smem = LM_MAX(LM_MAX(a->stages * a->stage_bytes, sums), ALONE_BYTES);
    return cuda_launch(st, a->gate_up ? "gate_up" : "gemm", gemm_tma<NT, RW>,
                       dim3((unsigned)blocks), dim3(THREADS), (size_t)(smem + ALIGNED), *a, maps);
}

template <int NT>
static lm_status launch_rows(struct cuda_stream *st, const struct kn_gemm *g, struct few_tma *a)
{
    const int rounds = LM_DIV_UP(a->groups, st->dev->sms * MAX_SHARE);
    const int blocks = LM_MIN(a->groups, rounds * st->dev->sms);
    a->share = LM_DIV_UP(a->groups, blocks);
    return a->share <= RT ? launch<NT, 1>(st, g, a, blocks)
                          : a->share <= 2 * RT ? launch<NT, 2>(st, g, a, blocks)
                                               : launch<NT, 4>(st, g, a, blocks);
}

extern "C" bool cuda_gemm_tma_fits(struct cuda_stream *st, const struct kn_gemm *a)
{
    return st->dev->cc == 90 && a->m <= ROWS_MAX && a->w->cols % BOX == 0 && a->ldx % 8 == 0 &&
           (uintptr_t)a->x % 16 == 0;
}

/* y is a->y, or for gate_up `out`, with rows of ldy. */
extern "C" lm_status cuda_gemm_tma(struct cuda_stream *st, const struct kn_gemm *g, void *out,
                                   bool gate_up)
{
    const int n = gate_up ? g->w->rows / 2 : g->w->rows;
    struct few_tma a = {};
    a.out = { out, g->bias, gate_up ? n : g->ldy, g->accumulate, g->y_f32 };
    a.m = g->m;
    a.n = n;
    a.groups = LM_DIV_UP(g->w->rows, GROUP);
    a.gate_up = gate_up;
    return g->m <= 8 ? launch_rows<1>(st, g, &a)
                     : g->m <= 16 ? launch_rows<2>(st, g, &a) : launch_rows<4>(st, g, &a);
}

template <int NT, int RW> static cudaError_t allow(void)
{
    cudaError_t e = cudaFuncSetAttribute(gemm_tma<NT, RW>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         RING_BYTES + ALIGNED);
    return e == cudaSuccess
               ? cudaFuncSetAttribute(gemm_tma<NT, RW>,
                                      cudaFuncAttributePreferredSharedMemoryCarveout, 100) : e;
}

template <int NT> static cudaError_t allow_rows(void)
{
    cudaError_t e = allow<NT, 1>();
    if (e == cudaSuccess)
        e = allow<NT, 2>();
    return e == cudaSuccess ? allow<NT, 4>() : e;
}

extern "C" cudaError_t cuda_gemm_init(const struct cuda_device *d)
{
    if (d->cc != 90)
        return cudaSuccess;
    cudaError_t e = allow_rows<1>();
    if (e == cudaSuccess)
        e = allow_rows<2>();
    return e == cudaSuccess ? allow_rows<4>() : e;
}
