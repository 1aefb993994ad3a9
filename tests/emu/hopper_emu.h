/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hopper_emu.h - the primitives of hopper.cuh for the emulator. A copy lands when somebody waits
 * for its barrier. Included by hopper.cuh only.
 */

static inline void mbar_init(uint64_t *bar, int arrivals)
{
    emu_mbar_init(bar, arrivals);
}

static inline void mbar_made(void) {}

static inline void mbar_arrive(uint64_t *bar)
{
    emu_mbar_arrive(bar, 0);
}

static inline void mbar_expect(uint64_t *bar, int bytes)
{
    emu_mbar_arrive(bar, bytes);
}

static inline void mbar_wait(uint64_t *bar, int parity)
{
    emu_mbar_wait(bar, parity);
}

/* 64 elements of the tensor to `at`, the pieces of 16 bytes where the 128-byte swizzle of shared
 * memory's addresses puts them. */
static inline void emu_tma_row(const struct cuda_tensor *t, uint32_t at, const int64_t c[5])
{
    const char *src = (const char *)t->base;
    bool outside = false;
    for (int d = 1; d < 5; d++) {
        outside |= c[d] < 0 || c[d] >= t->size[d];
        src += c[d] * t->stride[d];
    }
    for (int i = 0; i < 64; i++) {
        uint32_t to = at + (uint32_t)i * 2;
        uint16_t v = 0;
        if (!outside && c[0] + i >= 0 && c[0] + i < t->size[0])
            memcpy(&v, src + (c[0] + i) * 2, 2);
        to ^= to >> 3 & 0x70;
        memcpy(emu_dynamic_smem() + to, &v, 2);
    }
}

static inline void emu_tma_box(const struct cuda_tensor *t, uint32_t at, const int64_t from[5])
{
    int rows = 1;
    for (int d = 1; d < 5; d++)
        rows *= t->box[d];
    for (int r = 0; r < rows; r++) {
        int64_t c[5] = { from[0] };
        for (int d = 1, left = r; d < 5; left /= t->box[d++])
            c[d] = from[d] + left % t->box[d];
        emu_tma_row(t, at + (uint32_t)r * 128, c);
    }
}

static inline void tma_load(void *dst, const struct cuda_tensor_map *map, uint64_t *bar, int y,
                            int z)
{
    struct cuda_tensor t;
    memcpy(&t, map, sizeof t);
    const uint32_t at = smem_addr(dst);
    int bytes = 2;
    for (int d = 0; d < 5; d++)
        bytes *= t.box[d];
    emu_bulk_copy(bar, bytes, at % 128 == 0, [=] {
        const int64_t from[5] = { 0, 0, 0, y, z };
        emu_tma_box(&t, at, from);
    });
}

template <int N> static inline void registers_less(void)
{
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg's range");
}

template <int N> static inline void registers_more(void)
{
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg's range");
}
