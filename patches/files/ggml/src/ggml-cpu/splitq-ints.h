// SPDX-License-Identifier: MIT
// Blocks of the SplitQuantV2 family as small integers, for each instruction set. Included by splitq.c and splitq-mul.c.
#pragma once

#include "ggml-impl.h"
#include "ggml-splitq.h"
#include "ggml-windows.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define SPLITQ_AVX2
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define SPLITQ_AVX512
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SPLITQ_NEON
#endif

// One instruction where the processor has it; ggml's own conversion takes a dozen.
static inline float to_float(ggml_half h) {
#if defined(SPLITQ_AVX2) && defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(SPLITQ_NEON)
    __fp16 f;
    memcpy(&f, &h, sizeof(f));
    return f;
#else
    return GGML_FP16_TO_FP32(h);
#endif
}

// Each instruction set gives the same few pieces:
//   ints             32 small integers, one byte each, in order
//   lanes            8 int32 sums of 4 neighbouring products
//   sums             8 float sums
//   codes_<type>     a block's codes as ints
//   levels_<type>    a block's levels
//   look_up          codes -> levels, of 16
//   look_up_window   indices -> levels, of 64
//   look_up_turned   the same for indices of 7 bits, see splitq_level_at
//   dot_signed, dot_unsigned   ints (signed levels, or codes 0..15) times q8_0 ints -> lanes
//   load_ints, store_ints      32 bytes
//   sum_ints         the sum of all 32
//   equal            1 where two ints are equal, else 0
//   scaled_half      d * h, h a half, ready for add_scaled
//   add_scaled       sums + factor * lanes, fused
//   total            the end of the order described in splitq.h

#if defined(SPLITQ_AVX2)

typedef __m256i ints;
typedef __m256i lanes;
typedef __m256  sums;
typedef __m256  factor;

static inline ints load_ints(const void * from) {
    return _mm256_loadu_si256((const __m256i *) from);
}

static inline void store_ints(int8_t * to, ints v) {
    _mm256_storeu_si256((__m256i *) to, v);
}

static inline int32_t sum_ints(ints v) {
    const __m256i s4 = _mm256_sad_epu8(_mm256_xor_si256(v, _mm256_set1_epi8((char) 128)), _mm256_setzero_si256());
    const __m128i s2 = _mm_add_epi64(_mm256_castsi256_si128(s4), _mm256_extracti128_si256(s4, 1));
    return _mm_cvtsi128_si32(s2) + _mm_extract_epi32(s2, 2) - 32*128;
}

static inline ints load_4bit(const uint8_t * qs) {
    const __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) qs));
    return _mm256_and_si256(_mm256_srlv_epi64(q, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

static inline ints load_2bit(const uint8_t * qs) {
    int64_t q;
    memcpy(&q, qs, sizeof(q));
    return _mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(q), _mm256_setr_epi64x(0, 2, 4, 6)), _mm256_set1_epi8(3));
}

static inline ints load_1bit(const uint8_t * qh) {
    int32_t q;
    memcpy(&q, qh, sizeof(q));
#if defined(SPLITQ_AVX512)
    return _mm256_maskz_set1_epi8((__mmask32) q, 1);
#else
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit  = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    const __m256i set  = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(q), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(1));
#endif
}

static inline ints plus_4_times(ints low, ints high) {
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 2));
}

static inline ints look_up(ints codes, const int8_t * levels) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels)), codes);
}

// A shuffle gives 0 for a negative index: three further ones turn the levels of the first 16 indices into those of the next.
static inline ints look_up_window(ints index, const int8_t * levels) {
    ints found = look_up(index, levels);
    for (int i = 16; i < 64; i += 16) {
        const __m128i step = _mm_xor_si128(_mm_loadu_si128((const __m128i *) (levels + i)), _mm_loadu_si128((const __m128i *) (levels + i - 16)));
        const __m256i turn = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(step), _mm256_sub_epi8(index, _mm256_set1_epi8((char) i)));
        found = _mm256_xor_si256(found, turn);
    }
    return found;
}

static inline ints look_up_turned(ints index, const int8_t * levels) {
    const __m256i most = _mm256_set1_epi8(63), turn = _mm256_cmpgt_epi8(index, most);
    const __m256i low = _mm256_xor_si256(_mm256_and_si256(index, most), _mm256_abs_epi8(turn));
    return _mm256_xor_si256(look_up_window(low, levels), turn);
}

static inline lanes dot_unsigned(ints codes, ints y) {
#if defined(SPLITQ_AVX512)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, y);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, y), _mm256_set1_epi16(1));
#endif
}

static inline lanes dot_signed(ints levels, ints y) {
    return dot_unsigned(_mm256_abs_epi8(levels), _mm256_sign_epi8(y, levels));
}

static inline ints equal(ints a, int b) {
    return _mm256_and_si256(_mm256_cmpeq_epi8(a, _mm256_set1_epi8(b)), _mm256_set1_epi8(1));
}

static inline ints product(ints a, ints zero_or_one) {
    return _mm256_and_si256(a, _mm256_sub_epi8(_mm256_setzero_si256(), zero_or_one));
}

static inline sums no_sums(void) {
    return _mm256_setzero_ps();
}

static inline factor scaled_half(float d, ggml_half h) {
#if defined(__F16C__)
    return _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtph_ps(_mm_set1_epi16((short) h)));
#else
    return _mm256_set1_ps(d*GGML_FP16_TO_FP32(h));
#endif
}

static inline sums add_scaled(sums acc, factor d, lanes l) {
    return _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(l), acc);
}

static inline float total(sums even, sums odd) {
    const __m256 s8 = _mm256_add_ps(even, odd);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

#elif defined(SPLITQ_NEON)

typedef struct { int8x16_t half[2]; }   ints;
typedef struct { int32x4_t half[2]; }   lanes;
typedef struct { float32x4_t half[2]; } sums;
typedef float factor;

static inline ints load_ints(const void * from) {
    return (ints) {{ vld1q_s8(from), vld1q_s8((const int8_t *) from + 16) }};
}

static inline void store_ints(int8_t * to, ints v) {
    vst1q_s8(to, v.half[0]);
    vst1q_s8(to + 16, v.half[1]);
}

static inline int32_t sum_ints(ints v) {
    return vaddlvq_s8(v.half[0]) + vaddlvq_s8(v.half[1]);
}

static inline ints load_4bit(const uint8_t * qs) {
    const uint8x16_t q = vld1q_u8(qs);
    return (ints) {{ vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(q, 4)) }};
}

static inline ints load_2bit(const uint8_t * qs) {
    static const int8_t shift[32] = {
         0,  0,  0,  0,  0,  0,  0,  0, -2, -2, -2, -2, -2, -2, -2, -2,
        -4, -4, -4, -4, -4, -4, -4, -4, -6, -6, -6, -6, -6, -6, -6, -6,
    };
    const uint8x8_t  once = vld1_u8(qs);
    const uint8x16_t q    = vcombine_u8(once, once);
    const uint8x16_t m    = vdupq_n_u8(3);
    return (ints) {{
        vreinterpretq_s8_u8(vandq_u8(vshlq_u8(q, vld1q_s8(shift)),      m)),
        vreinterpretq_s8_u8(vandq_u8(vshlq_u8(q, vld1q_s8(shift + 16)), m)),
    }};
}

static inline ints load_1bit(const uint8_t * qh) {
    static const uint8_t bits[16] = { 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128 };
    const uint8x16_t bit = vld1q_u8(bits);
    const uint8x16_t one = vdupq_n_u8(1);
    return (ints) {{
        vreinterpretq_s8_u8(vandq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(qh[0]), vdup_n_u8(qh[1])), bit), one)),
        vreinterpretq_s8_u8(vandq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(qh[2]), vdup_n_u8(qh[3])), bit), one)),
    }};
}

static inline ints plus_4_times(ints low, ints high) {
    return (ints) {{ vorrq_s8(low.half[0], vshlq_n_s8(high.half[0], 2)), vorrq_s8(low.half[1], vshlq_n_s8(high.half[1], 2)) }};
}

static inline ints look_up(ints codes, const int8_t * levels) {
    const int8x16_t table = vld1q_s8(levels);
    return (ints) {{
        vqtbl1q_s8(table, vreinterpretq_u8_s8(codes.half[0])),
        vqtbl1q_s8(table, vreinterpretq_u8_s8(codes.half[1])),
    }};
}

static inline ints look_up_window(ints index, const int8_t * levels) {
    const int8x16x4_t table = {{ vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48) }};
    return (ints) {{
        vqtbl4q_s8(table, vreinterpretq_u8_s8(index.half[0])),
        vqtbl4q_s8(table, vreinterpretq_u8_s8(index.half[1])),
    }};
}

static inline int8x16_t turned_half(int8x16_t index, const int8x16x4_t table) {
    const int8x16_t most = vdupq_n_s8(63), turn = vreinterpretq_s8_u8(vcgtq_s8(index, most));
    const int8x16_t low = veorq_s8(vandq_s8(index, most), vabsq_s8(turn));
    return veorq_s8(vqtbl4q_s8(table, vreinterpretq_u8_s8(low)), turn);
}

static inline ints look_up_turned(ints index, const int8_t * levels) {
    const int8x16x4_t table = {{ vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48) }};
    return (ints) {{ turned_half(index.half[0], table), turned_half(index.half[1], table) }};
}

static inline int32x4_t dot_half(int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdupq_n_s32(0), a, b);
#else
    const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(a),  vget_low_s8(b)));
    const int32x4_t hi = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
    return vpaddq_s32(lo, hi);
#endif
}

static inline lanes dot_signed(ints levels, ints y) {
    return (lanes) {{ dot_half(levels.half[0], y.half[0]), dot_half(levels.half[1], y.half[1]) }};
}

static inline lanes dot_unsigned(ints codes, ints y) {
    return dot_signed(codes, y);
}

static inline ints equal(ints a, int b) {
    const uint8x16_t one = vdupq_n_u8(1);
    const int8x16_t  v   = vdupq_n_s8(b);
    return (ints) {{
        vreinterpretq_s8_u8(vandq_u8(vceqq_s8(a.half[0], v), one)),
        vreinterpretq_s8_u8(vandq_u8(vceqq_s8(a.half[1], v), one)),
    }};
}

static inline ints product(ints a, ints zero_or_one) {
    return (ints) {{ vmulq_s8(a.half[0], zero_or_one.half[0]), vmulq_s8(a.half[1], zero_or_one.half[1]) }};
}

static inline sums no_sums(void) {
    return (sums) {{ vdupq_n_f32(0), vdupq_n_f32(0) }};
}

static inline factor scaled_half(float d, ggml_half h) {
    return d*to_float(h);
}

static inline sums add_scaled(sums acc, factor d, lanes l) {
    return (sums) {{
        vfmaq_n_f32(acc.half[0], vcvtq_f32_s32(l.half[0]), d),
        vfmaq_n_f32(acc.half[1], vcvtq_f32_s32(l.half[1]), d),
    }};
}

static inline float total(sums even, sums odd) {
    const float32x4_t s4 = vaddq_f32(vaddq_f32(even.half[0], odd.half[0]), vaddq_f32(even.half[1], odd.half[1]));
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}

#else // scalar

typedef struct { int8_t  v[32]; } ints;
typedef struct { int32_t v[8]; }  lanes;
typedef struct { float   v[8]; }  sums;
typedef float factor;

static inline ints load_ints(const void * from) {
    ints r;
    memcpy(r.v, from, sizeof(r.v));
    return r;
}

static inline ints load_4bit(const uint8_t * qs) {
    ints r;
    for (int i = 0; i < 32; ++i) { r.v[i] = qs[i%16] >> 4*(i/16) & 15; }
    return r;
}

static inline ints load_2bit(const uint8_t * qs) {
    ints r;
    for (int i = 0; i < 32; ++i) { r.v[i] = qs[i%8] >> 2*(i/8) & 3; }
    return r;
}

static inline ints load_1bit(const uint8_t * qh) {
    ints r;
    for (int i = 0; i < 32; ++i) { r.v[i] = qh[i/8] >> i%8 & 1; }
    return r;
}

static inline ints plus_4_times(ints low, ints high) {
    for (int i = 0; i < 32; ++i) { low.v[i] += 4*high.v[i]; }
    return low;
}

static inline ints look_up(ints codes, const int8_t * levels) {
    for (int i = 0; i < 32; ++i) { codes.v[i] = levels[codes.v[i]]; }
    return codes;
}

static inline ints look_up_window(ints index, const int8_t * levels) {
    return look_up(index, levels);
}

static inline ints look_up_turned(ints index, const int8_t * levels) {
    for (int i = 0; i < 32; ++i) { index.v[i] = (int8_t) splitq_level_at(levels, index.v[i]); }
    return index;
}

static inline lanes dot_signed(ints levels, ints y) {
    lanes r = {{ 0 }};
    for (int i = 0; i < 32; ++i) { r.v[i/4] += levels.v[i]*y.v[i]; }
    return r;
}

static inline lanes dot_unsigned(ints codes, ints y) {
    return dot_signed(codes, y);
}

static inline ints equal(ints a, int b) {
    for (int i = 0; i < 32; ++i) { a.v[i] = a.v[i] == b; }
    return a;
}

static inline ints product(ints a, ints zero_or_one) {
    for (int i = 0; i < 32; ++i) { a.v[i] *= zero_or_one.v[i]; }
    return a;
}

static inline sums no_sums(void) {
    return (sums) {{ 0 }};
}

static inline factor scaled_half(float d, ggml_half h) {
    return d*to_float(h);
}

static inline sums add_scaled(sums acc, factor d, lanes l) {
    for (int i = 0; i < 8; ++i) { acc.v[i] = fmaf(d, (float) l.v[i], acc.v[i]); }
    return acc;
}

static inline float total(sums even, sums odd) {
    float s[8];
    for (int i = 0; i < 8; ++i) { s[i] = even.v[i] + odd.v[i]; }
    for (int i = 0; i < 4; ++i) { s[i] += s[i + 4]; }
    return (s[0] + s[2]) + (s[1] + s[3]);
}

#endif

static inline ints load_q8(const block_q8_0 * y) {
    return load_ints(y->qs);
}

static inline ints codes_sq4(const splitq_block_sq4 * x) { return load_4bit(x->qs); }
static inline ints codes_sq3(const splitq_block_sq3 * x) { return plus_4_times(load_2bit(x->qs), load_1bit(x->qh)); }
static inline ints codes_sq2(const splitq_block_sq2 * x) { return load_2bit(x->qs); }

// table_<type>: the levels, filled up to the 16 bytes that a shuffle reads
#define SPLITQ_LEVELS(name, down, up, lower, middle, upper)                       \
    static const int8_t table_##name[16] = { lower, middle, upper };              \
    static inline ints levels_##name(const splitq_block_##name * x) {             \
        return look_up(codes_##name(x), table_##name);                            \
    }
#include "ggml-splitq-levels.h"
#undef SPLITQ_LEVELS

#define SPLITQ_WINDOWS(name, bits, rms, ...)                                      \
    static inline ints levels_##name(const splitq_block_##name * x) {             \
        uint64_t windows[4];                                                      \
        splitq_windows_of_##name(x, windows);                                     \
        return (bits > 4 ? look_up_turned : look_up_window)(load_ints(windows), splitq_windows_##name); \
    }
#include "ggml-windows-tables.h"
#undef SPLITQ_WINDOWS
