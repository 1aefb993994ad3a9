/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wgmma_emu.h - wgmma for the emulator: descriptors are read as the PTX ISA's canonical layouts
 * say. A warp computes its own 16 rows, at once; the other warps' part needs nothing from it.
 * Included by wgmma.cuh only.
 */
static inline void wgmma_writes_done(void) {}
static inline void wgmma_begin(void) {}
static inline void wgmma_commit(void) {}
template <int N> static inline void wgmma_wait(void) {}
template <int NT> static inline void wgmma_hold(float (&)[NT][4]) {}

struct emu_desc {
    uint32_t start, lead, stride;       /* bytes */
};

static inline struct emu_desc emu_desc_of(uint64_t d)
{
    return { (uint32_t)(d & 0x3fff) << 4, (uint32_t)(d >> 16 & 0x3fff) << 4,
             (uint32_t)(d >> 32 & 0x3fff) << 4 };
}

/* The swizzle permutes address bits 4-6 by bits 7-9. */
static inline float emu_element(uint32_t at)
{
    at ^= at >> 3 & 0x70;
    return bf16_lo(*(const uint16_t *)(emu_dynamic_smem() + at));
}

static inline float emu_k_major(struct emu_desc d, int row, int k)
{
    return emu_element(d.start + (uint32_t)row / 8 * d.stride + (uint32_t)row % 8 * 128 +
                       (uint32_t)k * 2);
}

static inline float emu_mn_major(struct emu_desc d, int n, int k)
{
    return emu_element(d.start + (uint32_t)n / 64 * d.lead + (uint32_t)k / 8 * d.stride +
                       (uint32_t)k % 8 * 128 + (uint32_t)n % 64 * 2);
}

template <int NT> struct emu_wgmma {
    float d[NT][4];
    uint32_t a[4];
    uint64_t da, db;
    int add, warp;
};

template <int NT, bool RS>
static inline void emu_wgmma_run(const void *ins[32], void *outs[32], void *)
{
    typedef struct emu_wgmma<NT> op;
    static float a[16][16], b[16][NT * 8];
    const op *first = (const op *)ins[0];
    const struct emu_desc da = emu_desc_of(first->da), db = emu_desc_of(first->db);
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const op *o = (const op *)ins[l];
            int row = l / 4 + 8 * (i & 1), k = l % 4 * 2 + 8 * (i >> 1);
            a[row][k] = RS ? bf16_lo(o->a[i]) : emu_k_major(da, first->warp * 16 + row, k);
            a[row][k + 1] = RS ? bf16_hi(o->a[i]) : emu_k_major(da, first->warp * 16 + row, k + 1);
        }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < NT * 8; n++)
            b[k][n] = RS ? emu_mn_major(db, n, k) : emu_k_major(db, n, k);
    for (int l = 0; l < 32; l++) {
        const op *o = (const op *)ins[l];
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) {
                float sum = o->add ? o->d[n][i] : 0;
                for (int k = 0; k < 16; k++)
                    sum += a[l / 4 + 8 * (i >> 1)][k] * b[k][n * 8 + l % 4 * 2 + (i & 1)];
                ((float *)outs[l])[n * 4 + i] = sum;
            }
    }
}

template <int NT>
static inline void wgmma_ss(float (&d)[NT][4], uint64_t a, uint64_t b, int add)
{
    struct emu_wgmma<NT> o;
    memcpy(o.d, d, sizeof o.d);
    o.da = a, o.db = b, o.add = add, o.warp = (int)threadIdx.x / 32 % 4;
    emu_warp(&o, sizeof o, d, sizeof o.d, emu_wgmma_run<NT, false>, NULL);
}

template <int NT>
static inline void wgmma_rs(float (&d)[NT][4], const uint32_t a[4], uint64_t b)
{
    struct emu_wgmma<NT> o;
    memcpy(o.d, d, sizeof o.d);
    memcpy(o.a, a, sizeof o.a);
    o.da = 0, o.db = b, o.add = 1, o.warp = 0;
    emu_warp(&o, sizeof o, d, sizeof o.d, emu_wgmma_run<NT, true>, NULL);
}
