// SPDX-License-Identifier: MIT
// Reference encoder and decoder of the window types.

#include "ggml-windows.h"
#include "ggml-splitq-encode.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// The encoder. A chain is walked from its end to its beginning: the codes that follow a weight are the state s, its own code c
// is a step along edge e = s << bits | c, which has a level and leads to state e % states. Viterbi's algorithm finds the least
// cost of each state. A path is a chain that closes if it ends in the state that it began in.
//
// 1. Of each scale tried, both signs: the least cost of a path with free ends. Scales are those around the one that a table's
//    own fourth moment asks for: it looks at outliers as much as they matter.
// 2. For the most promising ones, the least costs from each state onwards, too: state s with the least sum of the two is where
//    the chain is closed. What closing costs, about, is that sum less twice the free path's cost. The least of all is taken.
// 3. The least path that begins and ends in that state, and its bytes; or zeros, where they are no worse.
//
// Costs are whole numbers, so their sums are the same everywhere: g*level^2 - 2*g*x*level, x being weight/scale and g, the
// share, a weight's importance in whole numbers, 1 at least. A block's largest g*x is as large as 16 bits allow. Equal costs
// are decided in favour of the scale tried first (from the smallest, positive before negative), the lower state, the lower edge.

// Where chains are open the best of 1 is taken, and its least path begins and ends in any state. Zeros there are none.

#define STEPS_DOWN  3          // scales tried: as many below the base
#define TRIED       12         // and signs
#define KEPT(bits)  ((bits) == 6 ? 3 : (bits) == 5 ? 5 : (bits) == 4 ? 4 : (bits) == 3 ? 3 : 6)
#define SPREAD      1.25f      // of the fourth moment's root to the root mean square; 1.316 for a Gaussian, less half a step
#define REACH       255.0f     // larger weights at the smallest scale count as this
#define SLOPE       32500.0f   // largest g*x
#define LEAST_SLOPE 32.0f      // of the weights times their importance; so no share is above 1016, and no cost above 2^30
#define NEVER       (1 << 30)  // what a path costs that begins in another state
#define ROUND       12582912.0f // 3*2^22: adding it rounds to a whole number, in the lowest bits

typedef struct {
    int     kept;
    int     base, shift; // of an open type: its first scale, and the step between two as a power of 2; base 0: closed
    float   spread;
    int32_t twice[128], square[128], both[128]; // of each edge: 2*level, level^2, and the two as 16 bits each
} splitq_trellis;

// The column of weight i, chain after chain.
static SPLITQ_INLINE int column(const int bits, int i) {
    const int step = bits >= 4 ? 2 : 4;
    return i/(8*step)*(8*step) + i%step*8 + i%(8*step)/step;
}

// Edges are in the order of the table but for sq3w, whose windows have the low bits of two codes below their high bits, and
// sq5w, whose windows have the two bits of the next code exchanged.
static splitq_trellis make_trellis(const int8_t * levels, float rms, int bits) {
    splitq_trellis trellis = { .kept = KEPT(bits), .spread = SPREAD*rms };
    for (int e = 0; e < SPLITQ_INDICES(bits); ++e) {
        const int level = splitq_level_at(levels, bits == 3 ? (e & 3) | (e >> 3 & 3) << 2 | (e >> 2 & 1) << 4 | e >> 5 << 5 :
                                                  bits == 5 ? (e & 31) | e >> 6 << 5 | (e >> 5 & 1) << 6 : e);
        trellis.twice [e] = 2*level;
        trellis.square[e] = level*level;
        trellis.both  [e] = (trellis.twice[e] & 0xffff) | trellis.square[e] << 16;
    }
    return trellis;
}

#if defined(__GNUC__)
#define SPLITQ_UNROLL_WAYS _Pragma("GCC unroll 64")
#else
#define SPLITQ_UNROLL_WAYS
#endif

#define LANES 4
#include "ggml-windows-lanes.h"
#undef SPLITQ_BEST_LANES
#if defined(SPLITQ_X86)
#pragma GCC push_options
#pragma GCC target("avx2")
#define LANES 8
#include "ggml-windows-lanes.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vnni")
#define LANES 16
#include "ggml-windows-lanes.h"
#pragma GCC pop_options
#define SPLITQ_BEST_LANES (__builtin_cpu_supports("avx512vnni") ? 16 : __builtin_cpu_supports("avx2") ? 8 : 4)
#define WINDOWS_ENCODE(lanes, ...) ((lanes) == 16 ? windows_encode_16(__VA_ARGS__) : \
                                    (lanes) == 8 ? windows_encode_8(__VA_ARGS__) : windows_encode_4(__VA_ARGS__))
#else
#define SPLITQ_BEST_LANES 4
#define WINDOWS_ENCODE(lanes, ...) windows_encode_4(__VA_ARGS__)
#endif
#if !defined(SPLITQ_LANES) // tests choose
#define SPLITQ_LANES SPLITQ_BEST_LANES
#endif

#define SPLITQ_WINDOWS(name, bits, rms, ...)                                                \
    static void encode_##name(const float * x, void * y, int64_t nrows, int64_t k, const float * imatrix, int base, int step) { \
        assert(k % SPLITQ_QK == 0);                                                         \
        splitq_trellis trellis = make_trellis(splitq_windows_##name, rms, bits);            \
        trellis.base  = base;                                                               \
        trellis.shift = step/2; /* of 1, 2, 4 */                                            \
        WINDOWS_ENCODE(SPLITQ_LANES, x, y, nrows*(k/SPLITQ_QK), k/SPLITQ_QK, imatrix, &trellis, bits); \
    }                                                                                       \
    void splitq_quantize_row_##name(const float * x, void * y, int64_t k) {                 \
        encode_##name(x, y, 1, k, NULL, 0, 0);                                              \
    }                                                                                       \
    void splitq_dequantize_row_##name(const void * x, float * y, int64_t k) {               \
        assert(k % SPLITQ_QK == 0);                                                         \
        const splitq_block_##name * b = x;                                                  \
        for (int64_t ib = 0; ib < k/SPLITQ_QK; ++ib, ++b, y += SPLITQ_QK) {                 \
            const float d = splitq_scale[b->d];                                             \
            uint64_t windows[4];                                                            \
            splitq_windows_of_##name(b, windows);                                           \
            for (int c = 0; c < SPLITQ_QK; ++c) {                                           \
                y[c] = d*splitq_level_at(splitq_windows_##name, windows[c/8] >> c%8*8 & 255); \
            }                                                                               \
        }                                                                                   \
    }
#include "ggml-windows-tables.h"
#undef SPLITQ_WINDOWS

void splitq_windows_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    switch (type) {
        case GGML_TYPE_SPLITQ_SQ6W: encode_sq6w(src, dst, nrows, n_per_row, imatrix, 0, 0); break;
        case GGML_TYPE_SPLITQ_SQ5W: encode_sq5w(src, dst, nrows, n_per_row, imatrix, 0, 0); break;
        case GGML_TYPE_SPLITQ_SQ4W: encode_sq4w(src, dst, nrows, n_per_row, imatrix, 0, 0); break;
        case GGML_TYPE_SPLITQ_SQ3W: encode_sq3w(src, dst, nrows, n_per_row, imatrix, 0, 0); break;
        case GGML_TYPE_SPLITQ_SQ2W: encode_sq2w(src, dst, nrows, n_per_row, imatrix, 0, 0); break;
        default: GGML_ABORT("not a window type: %d", type);
    }
}

void splitq_quantize_open(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix, int base, int step) {
    (type == GGML_TYPE_SPLITQ_SQ3WO ? encode_sq3w : encode_sq2w)(src, dst, nrows, n_per_row, imatrix, base, step);
}

#define DEQUANTIZE_OPEN(name, bits)                                                         \
    static void dequantize_##name(const splitq_block_##name * b, float * y, int64_t k, int base, int step) { \
        for (int64_t ib = 0; ib < k/SPLITQ_QK; ++ib, ++b, y += SPLITQ_QK) {                 \
            const float d = splitq_scale[splitq_open_scale(b->d, bits, base, step)];        \
            uint64_t windows[4];                                                            \
            splitq_windows_of_##name(b, windows);                                           \
            for (int c = 0; c < SPLITQ_QK; ++c) {                                           \
                y[c] = d*splitq_windows_##name[windows[c/8] >> c%8*8 & 255];                \
            }                                                                               \
        }                                                                                   \
    }
DEQUANTIZE_OPEN(sq3wo, 3)
DEQUANTIZE_OPEN(sq2wo, 2)

void splitq_dequantize_open(enum ggml_type type, const void * x, float * y, int64_t k, int base, int step) {
    assert(k % SPLITQ_QK == 0);
    type == GGML_TYPE_SPLITQ_SQ3WO ? dequantize_sq3wo(x, y, k, base, step) : dequantize_sq2wo(x, y, k, base, step);
}
