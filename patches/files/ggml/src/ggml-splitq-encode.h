// SPDX-License-Identifier: MIT
// What the reference encoders share: vector code, the order of sums, importance. Included by ggml-splitq.c, ggml-sdr.c.
#pragma once

#include <stdlib.h> // defines __GLIBC__

// Wider vectors give the same bytes, only sooner. A clone is chosen by the loader, which glibc's can and musl's cannot.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SPLITQ_X86
#define SPLITQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SPLITQ_CLONES
#endif

// Inlined, so that each clone and each codebook gets code of its own.
#if defined(__GNUC__)
#define SPLITQ_INLINE inline __attribute__((always_inline))
#else
#define SPLITQ_INLINE inline
#endif

// Short loops around or inside vector code must vanish for it to become vector code.
#if defined(__GNUC__)
#define SPLITQ_UNROLL _Pragma("GCC unroll 16")
#else
#define SPLITQ_UNROLL
#endif

// Sum of 2^n floats, halves added to halves: the order that whole-array code can follow.
static SPLITQ_INLINE float tree_sum(float * v, int n) {
    SPLITQ_UNROLL
    for (int half = n/2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) {
            v[j] += v[j + half];
        }
    }
    return v[0];
}

static SPLITQ_INLINE float clamped(float v, float limit) {
    return v > limit ? limit : v < -limit ? -limit : v + 0.0f; // + 0: no negative zeros
}

static const float unweighted[32] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

// A block whose columns all have weight 0 is encoded as if they had weight 1.
static inline const float * block_weight(const float * imatrix) {
    if (imatrix) {
        for (int j = 0; j < 32; ++j) {
            if (imatrix[j] > 0) {
                return imatrix;
            }
        }
    }
    return unweighted;
}
