// SPDX-License-Identifier: MIT
// Error feedback for the window types: a block of 32 columns for many rows. gguf_splitq/coding/windows.py says what is done
// and why, and has the reference; only the order of additions differs.

#include "ggml-windows-solve.h"
#include "ggml-windows.h"
#include "ggml-splitq-encode.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(SPLITQ_X86)
#include <immintrin.h>
#endif

#define SPLITQ_NEVER  1e30f // what a path costs that begins in a forbidden state
#define SPLITQ_SCALES 32    // at most
#define ROWS          8     // at most: 16 lanes, and 2 states or more
#define WAYS          64    // into a state, at most

#if defined(SPLITQ_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#include "ggml-windows-paths.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#define LANES 16
#include "ggml-windows-paths.h"
#pragma GCC pop_options
#elif defined(__aarch64__)
#define LANES 4
#include "ggml-windows-paths.h"
#endif
#define LANES 1
#include "ggml-windows-paths.h"

#if !defined(SPLITQ_LANES) // tests choose
#if defined(SPLITQ_X86)
#define SPLITQ_LANES (__builtin_cpu_supports("avx512f") ? 16 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 1)
#elif defined(__aarch64__)
#define SPLITQ_LANES 4
#else
#define SPLITQ_LANES 1
#endif
#endif

void splitq_windows_sweep(const splitq_sweep * s) {
    assert(s->n_scales <= SPLITQ_SCALES);
    switch (SPLITQ_LANES) {
#if defined(SPLITQ_X86)
        case 16: sweep_16(s); break;
        case 8:  sweep_8(s);  break;
#elif defined(__aarch64__)
        case 4:  sweep_4(s);  break;
#endif
        default: sweep_1(s);  break;
    }
}
