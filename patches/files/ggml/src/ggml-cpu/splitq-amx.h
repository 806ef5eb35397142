// SPDX-License-Identifier: MIT
// Tiles for splitq-mul.c: blocks of many tokens times panels, by AMX. Elsewhere tiles_allowed() is false and the rest is empty.
//
// A tile of weights has a block of 32 columns of a panel, a tile of activations the same columns of TILE tokens, both as
// bfloat16, and TDPBF16PS adds their product to float sums. So scales, of blocks, columns and rows, are multiplied in once,
// when the weights are decoded, and no sum is touched until the row ends. Tiles of int8 would take as many of these
// instructions, since scales are of 32 columns, and the sums of each block would have to leave their tile to be scaled: a
// third of the speed.
//
// What rounding costs: a level times its scale has at most 11 significant bits and bfloat16 keeps 8, as of activations.
// Both errors together are smaller than that of q8_0, see docs/kernels.md.
#pragma once

#include "splitq-vec.h"

#define TILE 16       // tokens, and rows
#define TILES_FROM 16 // tokens: with fewer, decoding the weights takes longer than the other kernels
#define TILES_KEPT (1 << 20) // bytes of decoded rows that a thread multiplies by one token after the other: half of its L2

typedef struct { uint16_t bf16[TILE][32]; } tile;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && defined(LANES) && LANES == TILE

#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether Linux grants this process its tiles; asked once, before or after threads start.
static inline bool tiles_allowed(void) {
    static atomic_int answer; // 0: not asked yet
    if (!atomic_load_explicit(&answer, memory_order_relaxed)) {
        const int request = 0x1023, data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        atomic_store_explicit(&answer, syscall(SYS_arch_prctl, request, data) ? -1 : 1, memory_order_relaxed);
    }
    return atomic_load_explicit(&answer, memory_order_relaxed) > 0;
}

// What LDTILECFG reads. The configuration is a thread's own, and llama.cpp's kernels for other types load theirs only once:
// it is put back.
struct tile_config {
    uint8_t  palette, start_row, reserved[14];
    uint16_t bytes[16]; // of a row
    uint8_t  rows[16];
};

// Not the intrinsics: GCC 12 believes that these touch 8 of the 64 bytes.
static inline void load_config(const struct tile_config * from) { __asm__ volatile("ldtilecfg %0" : : "m"(*from)); }
static inline void store_config(struct tile_config * to)        { __asm__ volatile("sttilecfg %0" : "=m"(*to)); }

static inline void tiles_begin(struct tile_config * before) {
    struct tile_config own = { .palette = 1 };
    for (int i = 0; i < 8; ++i) {
        own.bytes[i] = sizeof(tile)/TILE;
        own.rows[i]  = TILE;
    }
    store_config(before);
    load_config(&own);
    __asm__ volatile("" : : : "memory"); // loading a tile does not tell the compiler that it reads memory
}

static inline void tiles_end(const struct tile_config * before) {
    load_config(before);
}

static inline __m512i to_bf16(vec_f first, vec_f second) {
    return (__m512i) _mm512_cvtne2ps_pbh(second, first);
}

// Activations of 32 columns as they are stored, from `first` on; order: of the columns, if it is another.
static inline void tile_token(const float * x, const uint16_t * order, int first, uint16_t * to) {
    float stored[32];
    for (int j = 0; order && j < 32; ++j) { stored[j] = x[order[first + j]]; }
    x = order ? stored : x + first;
    _mm512_storeu_si512(to, to_bf16(load_f(x), load_f(x + LANES)));
}

// A block of a panel, see arrange, times the scales of its rows and, if there are any, of its columns. Columns 2*i and
// 2*i + 1 of a row are neighbours in row i.
static inline void tile_rows(const vec_b w[8], vec_f d, const ggml_half * scale, tile * to) {
    float column[32];
    for (int i = 0; scale && i < 32; i += LANES) { store_f(column + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (scale + i)))); }
    const __m512i pairs = _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a, 0x00190009, 0x00180008,
                                           0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002, 0x00110001, 0x00100000);
    const vec_i bias = set_i(-BIAS);
    for (int i = 0; i < 8; ++i) {
        vec_f level[4];
        for (int j = 0; j < 4; ++j) {
            level[j] = mul_f(to_f(dot(bias, w[i], set_i(1 << 8*j))), d);
            if (scale) { level[j] = mul_f(level[j], set_f(column[4*i + j])); }
        }
        for (int j = 0; j < 2; ++j) {
            _mm512_storeu_si512(to->bf16[2*i + j], _mm512_permutexvar_epi16(pairs, to_bf16(level[2*j], level[2*j + 1])));
        }
    }
}

// One or two groups of TILE tokens times one or two panels: sums[i][p] are of token i, panel p. y, x: nb tiles of each group
// and panel. The order in which columns are added is always the same.
SPLITQ_ALWAYS_INLINE void mul_some_tiles(const tile * y, const bool two_groups, const tile * x, const bool two_panels, int nb, float (*sums)[2][TILE]) {
    const int stride = sizeof(tile)/TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int b = 0; b < nb; ++b, ++x, ++y) {
        _tile_loadd(4, y, stride);
        _tile_loadd(6, x, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (two_panels) {
            _tile_loadd(7, x + nb, stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_groups) {
            _tile_loadd(5, y + nb, stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (two_groups && two_panels) {
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], sizeof(*sums));
    _tile_stored(1, sums[0][1], sizeof(*sums));
    _tile_stored(2, sums[TILE][0], sizeof(*sums));
    _tile_stored(3, sums[TILE][1], sizeof(*sums));
}

static inline void mul_tiles(const tile * y, bool two_groups, const tile * x, bool two_panels, int nb, float (*sums)[2][TILE]) {
    if (two_groups) {
        two_panels ? mul_some_tiles(y, true, x, true, nb, sums) : mul_some_tiles(y, true, x, false, nb, sums);
    } else {
        two_panels ? mul_some_tiles(y, false, x, true, nb, sums) : mul_some_tiles(y, false, x, false, nb, sums);
    }
}

#elif defined(LANES)

struct tile_config { char none; };

static inline bool tiles_allowed(void) { return false; }
static inline void tiles_begin(struct tile_config * before) { GGML_UNUSED(before); }
static inline void tiles_end(const struct tile_config * before) { GGML_UNUSED(before); }
static inline void tile_token(const float * x, const uint16_t * order, int first, uint16_t * to) { GGML_UNUSED(x), GGML_UNUSED(order), GGML_UNUSED(first), GGML_UNUSED(to); }
static inline void tile_rows(const vec_b w[8], vec_f d, const ggml_half * scale, tile * to) { GGML_UNUSED(w), GGML_UNUSED(d), GGML_UNUSED(scale), GGML_UNUSED(to); }
static inline void mul_tiles(const tile * y, bool two_groups, const tile * x, bool two_panels, int nb, float (*sums)[2][TILE]) {
    GGML_UNUSED(y), GGML_UNUSED(two_groups), GGML_UNUSED(x), GGML_UNUSED(two_panels), GGML_UNUSED(nb), GGML_UNUSED(sums);
}

#endif
