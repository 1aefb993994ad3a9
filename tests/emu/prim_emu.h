/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prim_emu.h - the primitives of prim.cuh for the emulator, written from the PTX ISA's fragment
 * tables. Included by prim.cuh only.
 */
static inline uint32_t emu_bf16_bits(float f)
{
    uint32_t u = __float_as_uint(f);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (u >> 16 | 0x40) & 0xffff;
    return ((u + 0x7fff + (u >> 16 & 1)) >> 16) & 0xffff;
}

static inline uint32_t bf16_pack(float lo, float hi)
{
    return emu_bf16_bits(lo) | emu_bf16_bits(hi) << 16;
}

static inline uint32_t bf16_mul(uint32_t x, uint32_t y)
{
    return bf16_pack(bf16_lo(x) * bf16_lo(y), bf16_hi(x) * bf16_hi(y));
}

static inline float exp2_fast(float x)
{
    return exp2f(x);
}

static inline uint32_t smem_addr(const void *p)
{
    return (uint32_t)((const unsigned char *)p - emu_dynamic_smem());
}

static inline void emu_ldmatrix(uint32_t r[4], const void *row, bool trans)
{
    emu_warp(&row, sizeof row, r, 16, [](const void *ins[32], void *outs[32], void *arg) {
        bool tr = *(bool *)arg;
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                const uint16_t *rows[8];
                for (int i = 0; i < 8; i++)
                    rows[i] = *(const uint16_t *const *)ins[8 * m + i];
                int g = l / 4, t = l % 4;
                uint32_t lo = tr ? rows[2 * t][g] : rows[g][2 * t];
                uint32_t hi = tr ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
                ((uint32_t *)outs[l])[m] = lo | hi << 16;
            }
    }, &trans);
}

static inline void ldmatrix(uint32_t r[4], const void *row)
{
    emu_ldmatrix(r, row, false);
}

static inline void ldmatrix_trans(uint32_t r[4], const void *row)
{
    emu_ldmatrix(r, row, true);
}

static inline float f16_lo(uint32_t pair)
{
    const int exp = pair >> 10 & 31, man = pair & 1023;
    float f = exp == 31 ? (man ? NAN : INFINITY)
                        : exp ? ldexpf((float)(1024 + man), exp - 25) : ldexpf((float)man, -24);
    return pair & 0x8000 ? -f : f;
}

static inline float f16_hi(uint32_t pair)
{
    return f16_lo(pair >> 16);
}

/* By its definition: the nearest multiple of the place's unit, ties to even. */
static inline uint32_t emu_f16_bits(float f)
{
    const uint32_t sign = __float_as_uint(f) >> 16 & 0x8000;
    const float mag = fabsf(f);
    if (mag != mag)
        return 0x7fff;
    int e = 0;
    if (mag > 0)
        (void)frexpf(mag, &e);                          /* mag < 2^e */
    e = e < -13 ? -13 : e;
    const float units = mag > 1e6f ? 4096 : rintf(ldexpf(mag, 11 - e));     /* up to 2048 */
    const float rounded = ldexpf(units, e - 11);
    if (rounded > 65504)
        return sign | 0x7c00;
    return sign | (units < 1024 ? (uint32_t)units
                                : (uint32_t)((e + 14) << 10) + (uint32_t)units - 1024);
}

static inline uint32_t f16_pack(float lo, float hi)
{
    return emu_f16_bits(lo) | emu_f16_bits(hi) << 16;
}

static inline uint32_t f16_mul(uint32_t x, uint32_t y)
{
    return f16_pack(f16_lo(x) * f16_lo(y), f16_hi(x) * f16_hi(y));
}

struct emu_frags {
    uint32_t a[4], b[2];
    float c[4];
};

static inline void emu_mma(const void *ins[32], void *outs[32], void *arg)
{
    static float a[16][16], b[16][8];
    float (*lo)(uint32_t) = *(bool *)arg ? f16_lo : bf16_lo;
    float (*hi)(uint32_t) = *(bool *)arg ? f16_hi : bf16_hi;
    for (int l = 0; l < 32; l++) {
        const struct emu_frags *f = (const struct emu_frags *)ins[l];
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) {
            a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)] = lo(f->a[i]);
            a[g + 8 * (i & 1)][2 * t + 1 + 8 * (i >> 1)] = hi(f->a[i]);
        }
        for (int i = 0; i < 2; i++) {
            b[2 * t + 8 * i][g] = lo(f->b[i]);
            b[2 * t + 1 + 8 * i][g] = hi(f->b[i]);
        }
    }
    for (int l = 0; l < 32; l++) {
        const struct emu_frags *f = (const struct emu_frags *)ins[l];
        for (int i = 0; i < 4; i++) {
            int row = l / 4 + 8 * (i >> 1), col = 2 * (l % 4) + (i & 1);
            float sum = f->c[i];
            for (int k = 0; k < 16; k++)
                sum += a[row][k] * b[k][col];
            ((float *)outs[l])[i] = sum;
        }
    }
}

static inline void emu_mma16(float c[4], const uint32_t a[4], const uint32_t b[2], bool f16)
{
    struct emu_frags f;
    memcpy(f.a, a, sizeof f.a);
    memcpy(f.b, b, sizeof f.b);
    memcpy(f.c, c, sizeof f.c);
    emu_warp(&f, sizeof f, c, 16, emu_mma, &f16);
}

static inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    emu_mma16(c, a, b, false);
}

static inline void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    emu_mma16(c, a, b, true);
}

static inline uint32_t transpose8(uint32_t x)
{
    uint32_t r;
    emu_warp(&x, sizeof x, &r, sizeof r, [](const void *ins[32], void *outs[32], void *) {
        for (int l = 0; l < 32; l++) {
            uint32_t pair[2];
            for (int i = 0; i < 2; i++)         /* element [2t + i][g] */
                pair[i] = *(const uint32_t *)ins[(l % 4 * 2 + i) * 4 + l / 4 / 2] >>
                          (l / 4 % 2 * 16) & 0xffff;
            *(uint32_t *)outs[l] = pair[0] | pair[1] << 16;
        }
    }, NULL);
    return r;
}

static inline void emu_mma8(const void *ins[32], void *outs[32], void *)
{
    static float a[16][8], b[8][8];
    for (int l = 0; l < 32; l++) {
        const struct emu_frags *f = (const struct emu_frags *)ins[l];
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = __uint_as_float(f->a[i] & ~0x1fffu);
        for (int i = 0; i < 2; i++)
            b[t + 4 * i][g] = __uint_as_float(f->b[i] & ~0x1fffu);
    }
    for (int l = 0; l < 32; l++) {
        const struct emu_frags *f = (const struct emu_frags *)ins[l];
        for (int i = 0; i < 4; i++) {
            int row = l / 4 + 8 * (i >> 1), col = 2 * (l % 4) + (i & 1);
            float sum = f->c[i];
            for (int k = 0; k < 8; k++)
                sum += a[row][k] * b[k][col];
            ((float *)outs[l])[i] = sum;
        }
    }
}

static inline void mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    struct emu_frags f;
    memcpy(f.a, a, sizeof f.a);
    memcpy(f.b, b, sizeof f.b);
    memcpy(f.c, c, sizeof f.c);
    emu_warp(&f, sizeof f, c, 16, emu_mma8, NULL);
}

static inline void cp_async16(void *dst, const void *src, bool valid)
{
    emu_copy_later(dst, valid ? src : NULL, 16);
}

static inline void cp_async_commit(void)
{
    emu_copy_commit();
}

template <int N> static inline void cp_async_wait(void)
{
    emu_copy_wait(N);
}

static inline uint4 load_once(const void *p)
{
    uint4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint4 load_weights(const void *p)
{
    return load_once(p);
}

static inline float load_l2(const float *p)
{
    return *p;
}

#define DYNAMIC_SMEM(name) unsigned char *name = emu_dynamic_smem()
