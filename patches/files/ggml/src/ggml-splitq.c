// SPDX-License-Identifier: MIT
// Reference encoders and decoders of the SplitQuantV2 family.
//
// Every operation here is a single float32 operation in a fixed order (the file is built with
// -ffp-contract=off), so that NumPy, doing the same operations on whole arrays, gives the same bytes.

#include "ggml-splitq.h"
#include "ggml-sdr.h"
#include "ggml-windows.h"
#include "ggml-splitq-encode.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <string.h>
#if defined(SPLITQ_X86)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Index of the largest scale not above y (y >= 0), 0 to 127.
static SPLITQ_INLINE int scale_below(float y) {
    if (y < 8*SPLITQ_SCALE_ULP) {
        return (int) (y * (1/SPLITQ_SCALE_ULP));
    }
    uint32_t bits;
    memcpy(&bits, &y, sizeof(bits));
    const int code = (int) (bits >> 20) - ((127 - 18) << 3) + 8; // 2^-18 is code 8
    return code > 127 ? 127 : code;
}

// One block: the scale byte with the least squared error, weighted by `weight`, and its codes.
static SPLITQ_INLINE uint8_t encode_block(const float * x, const float * weight, uint8_t * codes,
                                   const int8_t * levels, const int n_levels, const int steps_down, const int steps_up) {
    float w[SPLITQ_QK], error[SPLITQ_QK];

    float abs_max = 0.0f;
    for (int j = 0; j < SPLITQ_QK; ++j) {
        w[j]    = clamped(x[j], 127*SPLITQ_SCALE_MAX);
        abs_max = fabsf(w[j]) > abs_max ? fabsf(w[j]) : abs_max;
    }
    const int base = scale_below(abs_max / 127);

    int   best = 0; // scale 0: a block of zeros
    for (int j = 0; j < SPLITQ_QK; ++j) {
        error[j] = weight[j]*w[j]*w[j];
    }
    float least = tree_sum(error, SPLITQ_QK);

    for (int step = -steps_down; step <= steps_up; ++step) {
        const int code = base + step < 1 ? 1 : base + step > 127 ? 127 : base + step;
        for (int mirror = 0; mirror <= 128; mirror += 128) {
            const float d   = splitq_scale[code + mirror];
            const float inv = 1.0f/d;
            for (int j = 0; j < SPLITQ_QK; ++j) {
                const float scaled = w[j]*inv;
                float level = levels[0];
                SPLITQ_UNROLL
                for (int i = 1; i < n_levels; ++i) {
                    level += scaled > (levels[i - 1] + levels[i])*0.5f ? (float) (levels[i] - levels[i - 1]) : 0.0f;
                }
                const float r = w[j] - d*level;
                error[j] = weight[j]*r*r;
            }
            const float sum = tree_sum(error, SPLITQ_QK);
            if (sum < least) {
                least = sum;
                best  = code + mirror;
            }
        }
    }

    memset(codes, 0, SPLITQ_QK);
    if (best) {
        const float inv = 1.0f/splitq_scale[best];
        for (int i = 1; i < n_levels; ++i) {
            const float middle = (levels[i - 1] + levels[i])*0.5f;
            for (int j = 0; j < SPLITQ_QK; ++j) {
                codes[j] += w[j]*inv > middle;
            }
        }
    }
    return best;
}

static inline void pack_2bit(const uint8_t * codes, uint8_t * qs) {
    for (int j = 0; j < 8; ++j) {
        qs[j] = (codes[j] & 3) | (codes[j + 8] & 3) << 2 | (codes[j + 16] & 3) << 4 | (codes[j + 24] & 3) << 6;
    }
}

static inline void pack_4bit(const uint8_t * codes, uint8_t * qs) {
    for (int j = 0; j < 16; ++j) {
        qs[j] = codes[j] | codes[j + 16] << 4;
    }
}

static inline int get_2bit(const uint8_t * qs, int i) {
    return qs[i % 8] >> 2*(i/8) & 3;
}

static inline int get_4bit(const uint8_t * qs, int i) {
    return qs[i % 16] >> 4*(i/16) & 15;
}

static inline void pack_sq4(splitq_block_sq4 * b, const uint8_t * codes) {
    pack_4bit(codes, b->qs);
}

static inline void pack_sq3(splitq_block_sq3 * b, const uint8_t * codes) {
    pack_2bit(codes, b->qs);
    memset(b->qh, 0, sizeof(b->qh));
    for (int i = 0; i < SPLITQ_QK; ++i) {
        b->qh[i/8] |= (codes[i] >> 2) << i%8;
    }
}

static inline void pack_sq2(splitq_block_sq2 * b, const uint8_t * codes) {
    pack_2bit(codes, b->qs);
}

static inline int code_sq4(const splitq_block_sq4 * b, int i) { return get_4bit(b->qs, i); }
static inline int code_sq3(const splitq_block_sq3 * b, int i) { return get_2bit(b->qs, i) | (b->qh[i/8] >> i%8 & 1) << 2; }
static inline int code_sq2(const splitq_block_sq2 * b, int i) { return get_2bit(b->qs, i); }

// A level for each scaled weight x with one comparison: ranges from 13.125*i to 13.125*(i + 1), i from -8 to 7 and the
// outermost without end, hold at most one of the levels' middles each. Indexed by the low 4 bits of i.
#define SPLITQ_BUCKET 13.125f
typedef struct {
    float middle[16];           // infinity where there is none
    float upper[16], lower[16]; // the levels above and below it
} splitq_buckets;

typedef struct {
    int words, steps_down, steps_up; // words: 32-bit words of codes in a block
    splitq_buckets plain, turned;    // turned: for a negative scale, indexed by -i
    float upper[16], lower[16];      // codes above and below the middle: integers' bits
} splitq_book;

#if defined(SPLITQ_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#include "ggml-splitq-lanes.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#define LANES 16
#include "ggml-splitq-lanes.h"
#pragma GCC pop_options
#define SPLITQ_BEST_LANES (__builtin_cpu_supports("avx512f") ? 16 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0)
#define SPLITQ_ENCODE(lanes, ...) ((lanes) == 16 ? encode_16(__VA_ARGS__) : (lanes) == 8 ? encode_8(__VA_ARGS__) : 0)
#elif defined(__aarch64__)
#define LANES 4
#include "ggml-splitq-lanes.h"
#define SPLITQ_BEST_LANES 4
#define SPLITQ_ENCODE(lanes, ...) ((lanes) == 4 ? encode_4(__VA_ARGS__) : 0)
#endif

#if defined(SPLITQ_ENCODE)
#if !defined(SPLITQ_LANES) // tests choose
#define SPLITQ_LANES SPLITQ_BEST_LANES
#endif

static splitq_book make_book(const int8_t * levels, int n_levels, int words, int steps_down, int steps_up) {
    splitq_book book = { .words = words, .steps_down = steps_down, .steps_up = steps_up };
    for (int i = -8, code = 0; i < 8; ++i) {
        const int   next   = code + 1 < n_levels ? code + 1 : code;
        const float middle = (levels[code] + levels[next])*0.5f;
        const int   above  = i == 7 || middle < SPLITQ_BUCKET*(i + 1) ? next : code;
        const int   p = i & 15, t = -i & 15;
        book.plain.middle[p] = above > code ? middle : INFINITY;
        book.plain.lower [p] = book.turned.lower[t] = levels[code];
        book.plain.upper [p] = book.turned.upper[t] = levels[above];
        book.turned.middle[t] = -book.plain.middle[p];
        memcpy(&book.lower[p], &code,  sizeof(code));
        memcpy(&book.upper[p], &above, sizeof(above));
        code = above;
        GGML_ASSERT(i < 7 ? code + 1 == n_levels || levels[code] + levels[code + 1] > 2*SPLITQ_BUCKET*(i + 1) : code + 1 == n_levels);
    }
    return book;
}

#define SPLITQ_ENCODE_LANES(name, down, up) \
        const splitq_book book = make_book(splitq_levels_##name, n_levels, (sizeof(*y) - 1)/4, down, up); \
        ib = SPLITQ_ENCODE(SPLITQ_LANES, x, (uint8_t *) y, nrows*row_blocks, row_blocks, imatrix, &book);
#else
#define SPLITQ_ENCODE_LANES(name, down, up)
#endif

// encode_<type>: rows, with the importance of their columns or NULL.
#define SPLITQ_LEVELS(name, down, up, lower, middle, upper)                                                     \
    SPLITQ_CLONES static void encode_##name(const float * x, splitq_block_##name * y, int64_t nrows, int64_t k, const float * imatrix) { \
        assert(k % SPLITQ_QK == 0);                                                                            \
        const int n_levels = sizeof(splitq_levels_##name);                                                     \
        const int64_t row_blocks = k/SPLITQ_QK;                                                                \
        int64_t ib = 0;                                                                                        \
        SPLITQ_ENCODE_LANES(name, down, up)                                                                    \
        for (; ib < nrows*row_blocks; ++ib) {                                                                  \
            uint8_t codes[SPLITQ_QK];                                                                          \
            y[ib].d = encode_block(x + ib*SPLITQ_QK, block_weight(imatrix ? imatrix + ib%row_blocks*SPLITQ_QK : NULL), \
                                   codes, splitq_levels_##name, n_levels, down, up);                           \
            pack_##name(&y[ib], codes);                                                                        \
        }                                                                                                      \
    }                                                                                                          \
    void splitq_quantize_row_##name(const float * x, void * y, int64_t k) {                                    \
        encode_##name(x, y, 1, k, NULL);                                                                       \
    }                                                                                                          \
    SPLITQ_CLONES void splitq_dequantize_row_##name(const void * x, float * y, int64_t k) {                    \
        assert(k % SPLITQ_QK == 0);                                                                            \
        const splitq_block_##name * b = x;                                                                     \
        for (int64_t ib = 0; ib < k/SPLITQ_QK; ++ib, ++b, y += SPLITQ_QK) {                                    \
            float value[sizeof(splitq_levels_##name)];                                                         \
            for (size_t i = 0; i < sizeof(splitq_levels_##name); ++i) {                                        \
                value[i] = splitq_scale[b->d] * splitq_levels_##name[i];                                       \
            }                                                                                                  \
            SPLITQ_UNROLL                                                                                      \
            for (int j = 0; j < SPLITQ_QK; ++j) {                                                              \
                y[j] = value[code_##name(b, j)];                                                               \
            }                                                                                                  \
        }                                                                                                      \
    }
#include "ggml-splitq-levels.h"
#undef SPLITQ_LEVELS

// sq4x: k-means (k = 3) over a super-block, then 16 equally spaced levels from the least to the largest weight
// of each cluster. The published method is data-free, so an importance matrix changes nothing.

#define SQ4X_ROUNDS 16

static int range_of(float w, const float * centre) {
    return w <= (centre[0] + centre[1])*0.5f ? 0 : w < (centre[1] + centre[2])*0.5f ? 1 : 2;
}

SPLITQ_CLONES static void encode_sq4x(const float * x, splitq_block_sq4x * y) {
    float w[SPLITQ_QK_SQ4X], part[SPLITQ_QK_SQ4X];
    for (int j = 0; j < SPLITQ_QK_SQ4X; ++j) {
        w[j] = part[j] = clamped(x[j], 65504.0f);
    }

    float lo[3] = { w[0] }, hi[3] = { w[0] };
    for (int j = 1; j < SPLITQ_QK_SQ4X; ++j) {
        lo[0] = w[j] < lo[0] ? w[j] : lo[0];
        hi[0] = w[j] > hi[0] ? w[j] : hi[0];
    }
    const float mean = tree_sum(part, SPLITQ_QK_SQ4X) / SPLITQ_QK_SQ4X;
    float centre[3] = { (lo[0] + mean)*0.5f, mean, (hi[0] + mean)*0.5f };

    for (int round = 0; round < SQ4X_ROUNDS; ++round) {
        const float b0 = (centre[0] + centre[1])*0.5f;
        const float b1 = (centre[1] + centre[2])*0.5f;
        for (int k = 0; k < 3; ++k) {
            int count = 0;
            for (int j = 0; j < SPLITQ_QK_SQ4X; ++j) {
                const bool inside = k == 0 ? w[j] <= b0 : k == 1 ? w[j] > b0 && w[j] < b1 : w[j] > b0 && w[j] >= b1;
                part[j] = inside ? w[j] : 0.0f;
                count  += inside;
            }
            const float sum = tree_sum(part, SPLITQ_QK_SQ4X);
            centre[k] = count ? sum / count : centre[k];
        }
    }

    float scale[3], min[3];
    bool  empty[3] = { true, true, true };
    for (int j = 0; j < SPLITQ_QK_SQ4X; ++j) {
        const int k = range_of(w[j], centre);
        lo[k] = empty[k] || w[j] < lo[k] ? w[j] : lo[k];
        hi[k] = empty[k] || w[j] > hi[k] ? w[j] : hi[k];
        empty[k] = false;
    }
    for (int k = 0; k < 3; ++k) {
        y->min[k]   = GGML_FP32_TO_FP16(empty[k] ? 0.0f : lo[k]);
        min[k]      = GGML_FP16_TO_FP32(y->min[k]);
        y->scale[k] = GGML_FP32_TO_FP16(empty[k] || hi[k] < min[k] ? 0.0f : (hi[k] - min[k]) / 15);
        scale[k]    = GGML_FP16_TO_FP32(y->scale[k]);
    }

    for (int ib = 0; ib < SPLITQ_QK_SQ4X/32; ++ib) {
        uint8_t range[32], codes[32];
        for (int j = 0; j < 32; ++j) {
            const float v = w[32*ib + j];
            const int   k = range_of(v, centre);
            const float q = scale[k] > 0 ? rintf((v - min[k]) / scale[k]) : 0.0f;
            range[j] = k;
            codes[j] = q > 0 ? q < 15 ? (int) q : 15 : 0;
        }
        pack_2bit(range, y->sub[ib].range);
        pack_4bit(codes, y->sub[ib].qs);
    }
}

void splitq_quantize_row_sq4x(const float * x, void * y, int64_t k) {
    assert(k % SPLITQ_QK_SQ4X == 0);
    for (int64_t i = 0; i < k/SPLITQ_QK_SQ4X; ++i) {
        encode_sq4x(x + i*SPLITQ_QK_SQ4X, (splitq_block_sq4x *) y + i);
    }
}

void splitq_dequantize_row_sq4x(const void * x, float * y, int64_t k) {
    assert(k % SPLITQ_QK_SQ4X == 0);
    const splitq_block_sq4x * b = x;
    for (int64_t i = 0; i < k/SPLITQ_QK_SQ4X; ++i) {
        float scale[4] = { 0 }, min[4] = { 0 }; // range 3 is never written and reads as 0
        for (int r = 0; r < 3; ++r) {
            scale[r] = GGML_FP16_TO_FP32(b[i].scale[r]);
            min[r]   = GGML_FP16_TO_FP32(b[i].min[r]);
        }
        for (int j = 0; j < SPLITQ_QK_SQ4X; ++j) {
            const int r = get_2bit(b[i].sub[j/32].range, j%32);
            y[i*SPLITQ_QK_SQ4X + j] = min[r] + scale[r]*get_4bit(b[i].sub[j/32].qs, j%32);
        }
    }
}

size_t splitq_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    switch (type) {
        case GGML_TYPE_SPLITQ_SQ4:  encode_sq4(src, dst, nrows, n_per_row, imatrix);       break;
        case GGML_TYPE_SPLITQ_SQ3:  encode_sq3(src, dst, nrows, n_per_row, imatrix);       break;
        case GGML_TYPE_SPLITQ_SQ2:  encode_sq2(src, dst, nrows, n_per_row, imatrix);       break;
        case GGML_TYPE_SPLITQ_SQ4X: splitq_quantize_row_sq4x(src, dst, nrows*n_per_row);   break;
        case GGML_TYPE_SPLITQ_SDR4: sdr_quantize_chunk(src, dst, nrows, n_per_row, imatrix); break;
        case GGML_TYPE_SPLITQ_SQ6W:
        case GGML_TYPE_SPLITQ_SQ5W:
        case GGML_TYPE_SPLITQ_SQ4W:
        case GGML_TYPE_SPLITQ_SQ3W:
        case GGML_TYPE_SPLITQ_SQ2W: splitq_windows_quantize(type, src, dst, nrows, n_per_row, imatrix); break;
        default: GGML_ABORT("not a splitq type: %d", type);
    }
    return nrows*ggml_row_size(type, n_per_row);
}

// --- the rest of a conversion's loop

SPLITQ_CLONES float splitq_widen(enum ggml_type type, const void * src, float * dst, int64_t n) {
    uint32_t largest = 0;
    if (type == GGML_TYPE_F16) {
        // Exponent and mantissa moved to float32's places, then rescaled by the difference of the biases.
        const int16_t * x = src;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = ((uint32_t) (int32_t) x[i] & 0x80000000) | (x[i] & 0x7fffu) << 13;
            float value;
            memcpy(&value, &bits, sizeof(value));
            dst[i]  = value*0x1p112f;
            largest = (bits & 0x7fffffff) > largest ? (bits & 0x7fffffff) : largest;
        }
        float value;
        memcpy(&value, &largest, sizeof(value));
        return largest < 0x7c00u << 13 ? value*0x1p112f : INFINITY;
    }
    GGML_ASSERT(type == GGML_TYPE_F32 || type == GGML_TYPE_BF16);
    uint32_t * y = (uint32_t *) dst;
    for (int64_t i = 0; i < n; ++i) {
        y[i] = type == GGML_TYPE_F32 ? ((const uint32_t *) src)[i] : (uint32_t) ((const uint16_t *) src)[i] << 16;
        largest = (y[i] & 0x7fffffff) > largest ? (y[i] & 0x7fffffff) : largest;
    }
    float value;
    memcpy(&value, &largest, sizeof(value));
    return isfinite(value) ? value : INFINITY;
}

SPLITQ_CLONES static void add_errors(const float * x, const float * y, int n, double * signal, double * error, float * largest) {
    for (int i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            const float r = y[i + j] - x[i + j], xx = x[i + j]*x[i + j], rr = r*r;
            signal[j] += (double) xx;
            error[j]  += (double) rr;
            largest[j] = fabsf(r) > largest[j] ? fabsf(r) : largest[j];
        }
    }
}

void splitq_errors(enum ggml_type type, const void * data, const float * x, int64_t n, double * sums) {
    const struct ggml_type_traits * traits = ggml_get_type_traits(type);
    double signal[16] = { 0 }, error[16] = { 0 };
    float  largest[16] = { 0 }, decoded[1024];
    for (int64_t i = 0; i < n; i += 1024) {
        const int count = n - i < 1024 ? n - i : 1024;
        traits->to_float((const char *) data + ggml_row_size(type, i), decoded, count);
        add_errors(x + i, decoded, count, signal, error, largest);
    }
    for (int j = 1; j < 16; ++j) {
        signal[0] += signal[j];
        error[0]  += error[j];
        largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
    }
    sums[0] = signal[0];
    sums[1] = error[0];
    sums[2] = largest[0];
}

bool splitq_validate_blocks(enum ggml_type type, const void * data, size_t nblocks) {
    if (type != GGML_TYPE_SPLITQ_SQ4X) {
        return true; // every scale byte is a finite number and every code a level; side tensors are checked when loaded
    }
    const splitq_block_sq4x * b = data;
    for (size_t i = 0; i < nblocks; ++i) {
        for (int k = 0; k < 3; ++k) {
            if (!isfinite(GGML_FP16_TO_FP32(b[i].scale[k])) || !isfinite(GGML_FP16_TO_FP32(b[i].min[k]))) {
                fprintf(stderr, "%s: sq4x super-block %zu: range %d is not finite\n", __func__, i, k);
                return false;
            }
        }
        for (int j = 0; j < SPLITQ_QK_SQ4X; ++j) {
            if (get_2bit(b[i].sub[j/32].range, j%32) == 3) {
                fprintf(stderr, "%s: sq4x super-block %zu: weight %d names a fourth range\n", __func__, i, j);
                return false;
            }
        }
    }
    return true;
}
