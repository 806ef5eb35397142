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
#define TOGETHER      64    // rows that go through all blocks together

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

// Aims of a block for `some` rows, moved by the changes of `earlier` columns.
SPLITQ_CLONES static void moved_aims(const float * aims, const float * changes, int64_t rows, int some, const float * push, int64_t width,
                                     int earlier, float * moved) {
    for (int j = 0; j < SPLITQ_QK; ++j) {
        float sum[TOGETHER];
        memcpy(sum, aims + j*rows, sizeof(float)*some);
        for (int i = 0; i < earlier; ++i) {
            const float by = push[i*width + j];
            for (int r = 0; r < some; ++r) {
                sum[r] += by*changes[i*rows + r];
            }
        }
        memcpy(moved + j*some, sum, sizeof(float)*some);
    }
}

void splitq_windows_code(const splitq_windows_kind * kind, int32_t n_blocks, int64_t n_rows, const float * aims, const float * base,
                         const float * push, int64_t width, const float * costs, const uint8_t * states, uint8_t * params,
                         uint8_t * edges, float * changes) {
    const int chains = kind->bits >= 4 ? 2 : 1;
    for (int64_t first = 0; first < n_rows; first += TOGETHER) {
        const int some = n_rows - first < TOGETHER ? (int) (n_rows - first) : TOGETHER;
        for (int b = 0; b < n_blocks; ++b) {
            const int64_t column = SPLITQ_QK*b, at = column*n_rows + first;
            float moved[SPLITQ_QK*TOGETHER], from[SPLITQ_QK*TOGETHER], scales[SPLITQ_SCALES*TOGETHER], inside[SPLITQ_QK*SPLITQ_QK];
            uint8_t held[2*TOGETHER], found[SPLITQ_QK*TOGETHER], tried[SPLITQ_SCALES][TOGETHER];
            int64_t choice[TOGETHER];
            moved_aims(aims + at, changes + first, n_rows, some, push ? push + column : NULL, width, push ? column : 0, moved);
            for (int i = 0; i < SPLITQ_QK; ++i) {
                memcpy(from + i*some, base + at + i*n_rows, sizeof(float)*some);
                for (int j = 0; push && j < SPLITQ_QK; ++j) {
                    inside[i*SPLITQ_QK + j] = push[(column + i)*width + column + j];
                }
            }
            for (int c = 0; states && c < chains; ++c) {
                memcpy(held + c*some, states + (chains*b + c)*n_rows + first, some);
            }
            uint8_t * bytes = params + b*n_rows + first;
            for (int s = 0; s < kind->n_scales; ++s) {
                for (int r = 0; r < some; ++r) {
                    int size = (bytes[r] & 127) + kind->added[s];
                    size = size < 0 ? 0 : size >= kind->positive ? kind->positive - 1 : size;
                    tried[s][r] = size | ((bytes[r] & 128) ^ kind->turned[s]);
                    scales[s*some + r] = kind->table[tried[s][r]];
                }
            }
            splitq_windows_sweep(&(splitq_sweep) {
                .bits = kind->bits, .n_scales = kind->n_scales, .closed = kind->closed, .n_rows = some, .levels = kind->levels,
                .aims = moved, .base = from, .scales = scales, .push = push ? inside : NULL, .costs = costs + column,
                .states = states ? held : NULL, .edges = found, .choice = choice,
            });
            for (int r = 0; r < some; ++r) {
                bytes[r] = tried[choice[r]][r];
            }
            for (int i = 0; i < SPLITQ_QK; ++i) {
                memcpy(edges + at + i*n_rows, found + i*some, some);
                for (int r = 0; r < some; ++r) {
                    changes[at + i*n_rows + r] = kind->levels[found[i*some + r]]*kind->table[bytes[r]] - from[i*some + r];
                }
            }
        }
    }
}
