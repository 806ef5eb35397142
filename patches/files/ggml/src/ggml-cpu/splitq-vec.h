// SPDX-License-Identifier: MIT
// Vectors for splitq-mul.c, one section for each instruction set; without LANES there is no kernel for this one.
//
//   LANES    32-bit values in a vector
//   TOKENS   how many tokens' sums fit the registers beside the 8 vectors of a block of LANES rows
//   BIAS     128 where the dot product takes one factor unsigned: it is added to the levels, and its share subtracted
//   vec_b    4*LANES bytes
//   vec_i, vec_f   LANES int32, floats
//   vec_d    LANES scale bytes
//   vec_t    the levels, for looking up codes; vec_w: for windows
//   dot            adds the products of 4 neighbouring bytes; levels carry the BIAS
//   dot_token      a block of LANES rows, as unpacked below, times a block of one token
//   pair, arrange, dot_pair   the same for two tokens, after pairing their activations and arranging the rows
//   reduce_1, reduce_2     LANES sums of a block, from 4 or 2 vectors with 4 or 2 sums for each block
//   unpack_<type>  rows as stored: the levels of vector v's blocks, see struct few; adds their scale bytes to d, returns it
//   panel_<type>   interleaved rows: w[i] has levels 4*i .. 4*i + 3 of a block of LANES rows
//   scale_f, scale_sdr4        scale bytes as floats, 2^4 times too large
//
// For window codes, whose words of 64 bits have 8 columns at each bit position, the rest follows below from
//   set_8          8 activations, repeated
//   evens, odds    every other 32-bit value of a, then of b, in each 128 bits
//   high_first, high_second    the high bits of rows 0, 1, 4, 5, 8 .. and 2, 3, 6, 7, 10 .., for levels_5w and levels_3w
//   later          such high bits, or those of sq6w, of columns 16 further on
//   odd_later      the same in every other 64 bits, which are for a row's second word
//   levels_6w .. levels_2w     of 64-bit words q: level[i] has those of columns 8*i .. 8*i + 7
//
// For open chains, whose scale byte has what follows a word:
//   scale_open     scale bytes as floats, like scale_f
//   load_states    the scale bytes of LANES rows as 32-bit values
//   states_first, states_second    such values without their lowest bits, twice in 64 bits, of the rows as above
//   open_first, open_second        high bits as high_first and high_second, what follows them taken from such values
//   levels_3wo, levels_2wo         as levels_3w and levels_2w; state: from such values, without the bit that follows qh
#pragma once

#include "ggml-sdr.h"
#include "splitq-ints.h"

#define table_sdr4 splitq_levels_sdr4

// The block scales of open types: number s is that of byte base + (s << shift); in `scales` the positive ones and then the negative
// ones, 2^4 times too large. Of other types nothing.
struct grid {
    int   base, shift;
    float scales[32];
};

#if defined(__GNUC__)
#define SPLITQ_ALWAYS_INLINE   static inline __attribute__((always_inline))
#define SPLITQ_UNROLL_8 _Pragma("GCC unroll 8")
#define SPLITQ_UNROLL_16 _Pragma("GCC unroll 16")
#else
#define SPLITQ_ALWAYS_INLINE   static inline
#define SPLITQ_UNROLL_8
#define SPLITQ_UNROLL_16
#endif

// The processor's own prefetching ends with each page of 4 KB, also inside of larger pages.
#if defined(__GNUC__)
#define SPLITQ_PREFETCH(at, distance, bytes) for (size_t byte = (distance); byte + 32 < (distance) + (bytes); byte += 64) { __builtin_prefetch((const void *) ((uintptr_t) (at) + byte)); }
#else
#define SPLITQ_PREFETCH(at, distance, bytes)
#endif

// One stream of panels: on an Intel Xeon fetching them decodes half as fast again, Zen loses 5 % by it.
#if defined(__znver3__) || defined(__znver4__)
#define SPLITQ_PANEL_PREFETCH(at, bytes)
#else
#define SPLITQ_PANEL_PREFETCH(at, bytes) SPLITQ_PREFETCH(at, 8192, bytes)
#endif

#if defined(SPLITQ_AVX2)
// Of bytes d of sdr4: the index of the step where every octave has 4. A difference below 0 wraps around, to one that is larger.
static inline __m128i sdr_index(__m128i d) {
    const __m128i fine   = _mm_min_epu8(d, _mm_sub_epi8(d, _mm_set1_epi8(SDR_FINE)));
    const __m128i coarse = _mm_min_epu8(_mm_sub_epi8(d, _mm_set1_epi8((char) SDR_SHIFT_2ND)), _mm_sub_epi8(d, _mm_set1_epi8((char) SDR_SHIFT_1ST)));
    return _mm_min_epu8(fine, _mm_adds_epu8(coarse, coarse));
}
#endif

#if defined(SPLITQ_AVX512) && defined(__AVX512VBMI__) && defined(__AVX512DQ__)

#define LANES  16
#define TOKENS 16
#define BIAS   128

typedef __m512i vec_b;
typedef __m512i vec_i;
typedef __m512  vec_f;
typedef __m128i vec_d;
typedef struct { vec_b places[3]; } vec_t;
typedef __m512i vec_w;

static inline vec_d load_d(const uint8_t * p)    { return _mm_loadu_si128((const __m128i *) p); }
static inline vec_b load_b(const void * p)       { return _mm512_loadu_si512(p); }
static inline vec_i load_i(const int32_t * p)    { return _mm512_loadu_si512(p); }
static inline vec_f load_f(const float * p)      { return _mm512_loadu_ps(p); }
static inline void  store_f(float * p, vec_f v)  { _mm512_storeu_ps(p, v); }
static inline vec_d zero_d(void)                 { return _mm_setzero_si128(); }
static inline vec_i zero_i(void)                 { return _mm512_setzero_si512(); }
static inline vec_f zero_f(void)                 { return _mm512_setzero_ps(); }
static inline vec_i set_i(int32_t v)             { return _mm512_set1_epi32(v); }
static inline vec_f set_f(float v)               { return _mm512_set1_ps(v); }
static inline vec_i add_i(vec_i a, vec_i b)      { return _mm512_add_epi32(a, b); }
static inline vec_f mul_f(vec_f a, vec_f b)      { return _mm512_mul_ps(a, b); }
static inline vec_f to_f(vec_i a)                { return _mm512_cvtepi32_ps(a); }
static inline vec_f fma_f(vec_f a, vec_f b, vec_f c) { return _mm512_fmadd_ps(a, b, c); }
static inline float sum_f(vec_f a)               { return _mm512_reduce_add_ps(a); }

static inline vec_i dot(vec_i sum, vec_b levels, vec_b y) {
    return _mm512_dpbusd_epi32(sum, levels, y);
}

static inline vec_i dot_token(vec_i sum, const vec_b w[8], const int8_t * y) {
    for (int i = 0; i < 8; ++i) {
        int32_t four;
        memcpy(&four, y + 4*i, sizeof(four));
        sum = dot(sum, w[i], _mm512_set1_epi32(four));
    }
    return sum;
}

static inline vec_i reduce_1(const vec_i p[4]) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

static inline vec_b evens(vec_b a, vec_b b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88));
}

static inline vec_b odds(vec_b a, vec_b b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0xdd));
}

static inline vec_i reduce_2(const vec_i p[2]) {
    return _mm512_add_epi32(evens(p[0], p[1]), odds(p[0], p[1]));
}

// Scale bytes as halves, 2^4 times too large.
static inline vec_f scale_f(vec_d d) {
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(d), 7), _mm256_set1_epi16((short) 0xbfff));
    return _mm512_cvtph_ps(half);
}

// Looked up: bytes as 32-bit values are there for the states.
static inline vec_f scale_open(vec_d d, const int bits, const struct grid * grid) {
    const __m512i number = bits == 3 ? _mm512_srli_epi32(_mm512_cvtepu8_epi32(d), 3) : _mm512_srli_epi32(_mm512_cvtepu8_epi32(d), 4);
    return bits == 3 ? _mm512_permutex2var_ps(load_f(grid->scales), number, load_f(grid->scales + LANES)) :
                       _mm512_permutexvar_ps(number, load_f(grid->scales));
}

static inline vec_f scale_sdr4(vec_d d) {
    const __m128i   fine     = _mm_set1_epi8(SDR_FINE);
    const __mmask16 negative = _mm_cmplt_epu8_mask(_mm_sub_epi8(d, fine), fine);
    const vec_i     step     = add_i(_mm512_slli_epi32(_mm512_cvtepu8_epi32(sdr_index(d)), 21), set_i((127 - 15 + 4) << 23));
    return _mm512_castsi512_ps(_mm512_mask_or_epi32(step, negative, step, set_i(INT32_MIN)));
}

// The blocks of one vector, 52 to 104 bytes, are seen through two loads that do not read past them.
#define AT(byte, span) (char) ((byte) < 64 ? (byte) : (byte) - (span) + 128)
#define AT4(byte, span)  AT(byte, span), AT(byte + 1, span), AT(byte + 2, span), AT(byte + 3, span)
#define AT8(byte, span)  AT4(byte, span), AT4(byte + 4, span)
#define EACH8(at, size, span, first) { \
    at(0*size + first, span), at(1*size + first, span), at(2*size + first, span), at(3*size + first, span), \
    at(4*size + first, span), at(5*size + first, span), at(6*size + first, span), at(7*size + first, span) }
#define QH(byte, span) AT4(byte, span), 0, 0, 0, 0
#define QH_TWICE(byte, span) AT4(byte, span), AT4(byte, span)
#define QH_THEN(byte, span) AT4(byte, span), SAME4(byte + 4, span)
#define QH4_TIMES4(byte, span) QH_TWICE(byte, span), QH_TWICE(byte, span)
#define QH8_TWICE(byte, span) AT8(byte, span), AT8(byte, span)
#define PAIR2(a, b, span) AT(a, span), AT(b, span), AT(a, span), AT(b, span)
#define SAME4(a, span) AT(a, span), AT(a, span), AT(a, span), AT(a, span)
#define SAME8(a, span) SAME4(a, span), SAME4(a, span)
#define SAME16(a, span) SAME4(a, span), SAME4(a, span), SAME4(a, span), SAME4(a, span)

static const char at_qs_sq3[64] = EACH8(AT8, 13, 104, 0);
static const char at_qh_sq3[64] = EACH8(QH,  13, 104, 8);
static const char at_qh_sq6w[64] = { QH8_TWICE(16, 100), QH8_TWICE(41, 100), QH8_TWICE(66, 100), QH8_TWICE(91, 100) };
static const char at_qh_sq5w[64] = { QH4_TIMES4(16, 84), QH4_TIMES4(37, 84), QH4_TIMES4(58, 84), QH4_TIMES4(79, 84) };
static const char at_qh_sq3w[64] = EACH8(QH_TWICE, 13, 104, 8);
static const char at_qh_sq3wo[64] = EACH8(QH_THEN, 13, 104, 8);
static const char at_qs_sq2[64] = EACH8(AT8,  9,  72, 0);
static const char at_d_sq2wo[64] = EACH8(SAME8, 9, 72, 8);
static const char at_d_sq6w[64] = { SAME4(24, 100), SAME4(49, 100), SAME4(74, 100), SAME4(99, 100) };
static const char at_d_sq5w[64] = { SAME4(20, 84), SAME4(41, 84), SAME4(62, 84), SAME4(83, 84) };
static const char at_d_sq4[64]  = { SAME4(12, 64), SAME4(29, 64), SAME4(46, 64), SAME4(63, 64) }; // of the second load
static const char at_d_sdr4[64] = { SAME16(12, 64), SAME16(29, 64), SAME16(46, 64), SAME16(63, 64) };                   // the same
static const char at_d_sq3[64]  = { PAIR2(12, 25, 104), PAIR2(38, 51, 104), PAIR2(64, 77, 104), PAIR2(90, 103, 104) };
static const char at_d_sq2[64]  = { PAIR2(0, 9, 64), PAIR2(18, 27, 64), PAIR2(36, 45, 64), PAIR2(54, 63, 64) };     // the same

static inline vec_b pick(vec_b low, vec_b high, const char * at) {
    return _mm512_permutex2var_epi8(low, load_b(at), high);
}

// By multiplying, which leaves the units that shift to the shuffles.
static inline vec_b shift_right(vec_b q, int bits) {
    return _mm512_mulhi_epu16(q, _mm512_set1_epi16((short) (1 << (16 - bits))));
}

// The lanes of vector v's blocks, see struct few.
static inline __mmask64 lanes_of(int units, int v) {
    return (__mmask64) (units == 1 ? 0x1111 : 0x3333) << units*v;
}

// A look-up takes the low 6 bits of a byte, so neither the bits beside a code nor its place among the 6 need instructions
// of their own: table i has its levels where code i of a byte finds them.
static inline vec_t load_tables(const int8_t * levels, int n) {
    const vec_b at = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928, 0x2726252423222120,
                                      0x1f1e1d1c1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
    const vec_b three = _mm512_set1_epi8(3);
    const vec_b repeated = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) levels)), _mm512_set1_epi8((char) BIAS));
    vec_b code[3] = { _mm512_and_si512(at, _mm512_set1_epi8((char) (n - 1))), _mm512_srli_epi16(at, 2), _mm512_srli_epi16(at, 4) };
    if (n == 8) { // the third bit is beside the other two: bit 2 of 0 and 1, bit 4 of 2 and 3, bit 3 of 4 and 5
        code[1] = _mm512_and_si512(code[1], _mm512_set1_epi8(7));
        code[2] = _mm512_or_si512(_mm512_and_si512(code[2], three), _mm512_and_si512(_mm512_srli_epi16(at, 1), _mm512_set1_epi8(4)));
    } else {
        code[1] = _mm512_and_si512(code[1], three);
        code[2] = _mm512_and_si512(code[2], three);
    }
    vec_t table;
    for (int i = 0; i < 3; ++i) { table.places[i] = _mm512_permutexvar_epi8(code[i], repeated); }
    return table;
}

// The first 16 bytes of four blocks.
static inline vec_b load_4bit_codes(const void * x, const size_t size) {
    const char * at = x;
    vec_b q = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) at));
    q = _mm512_mask_broadcast_i32x4(q, 0x00f0, _mm_loadu_si128((const __m128i *) (at + size)));
    q = _mm512_mask_broadcast_i32x4(q, 0x0f00, _mm_loadu_si128((const __m128i *) (at + 2*size)));
    return _mm512_mask_broadcast_i32x4(q, 0xf000, _mm_loadu_si128((const __m128i *) (at + 3*size)));
}

static inline vec_d unpack_sq4(const splitq_block_sq4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    const vec_b high = load_b((const char *) x + 4);
    const vec_b q    = load_4bit_codes(x, sizeof(*x));
    level[0] = _mm512_permutexvar_epi8(q, table.places[0]);
    level[1] = _mm512_permutexvar_epi8(shift_right(q, 4), table.places[0]);
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(1, v), load_b(at_d_sq4), high));
}

static inline vec_b doubled(vec_b levels) {
    return _mm512_add_epi8(levels, _mm512_xor_si512(levels, _mm512_set1_epi8((char) BIAS)));
}

static inline vec_d unpack_sdr4(const splitq_block_sdr4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    const vec_b end = load_b((const char *) x + 4);
    const vec_b low = load_4bit_codes(x, sizeof(*x)), high = shift_right(low, 4);
    const vec_b own_d = _mm512_permutexvar_epi8(load_b(at_d_sdr4), end);
    const __mmask64 first  = _mm512_cmpge_epu8_mask(own_d, _mm512_set1_epi8((char) SDR_SHIFT_1ST));
    const __mmask64 second = _mm512_mask_cmpge_epu8_mask(~first, own_d, _mm512_set1_epi8((char) SDR_SHIFT_2ND));
    level[0] = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(low,  table.places[0]), first,  low,  doubled(table.places[0]));
    level[1] = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(high, table.places[0]), second, high, doubled(table.places[0]));
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(1, v), load_b(at_d_sq4), end));
}

// Into bit `place` of each byte that bit of its 8 bytes of qh which is `more` after the one given by byte j of first.
static inline vec_b with_high_bit(vec_b low, vec_b qh, int64_t first, int more, int place) {
    const vec_b at   = _mm512_add_epi8(_mm512_set1_epi64(first), _mm512_set1_epi8((char) (more - place)));
    const vec_b bits = _mm512_multishift_epi64_epi8(at, qh);
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8((char) (1 << place)), bits, low, 0xca);
}

static inline vec_d unpack_sq3(const splitq_block_sq3 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    const vec_b low  = load_b(x);
    const vec_b high = load_b((const char *) x + 40);
    const vec_b qs   = pick(low, high, at_qs_sq3);
    const vec_b qh   = pick(low, high, at_qh_sq3);
    const int64_t first = 0x0706050403020100;
    level[0] = _mm512_permutexvar_epi8(with_high_bit(qs, qh, first, 0, 2), table.places[0]);
    level[1] = _mm512_permutexvar_epi8(with_high_bit(qs, qh, first, 8, 4), table.places[1]);
    level[2] = _mm512_permutexvar_epi8(with_high_bit(qs, qh, first, 16, 3), table.places[2]);
    level[3] = _mm512_permutexvar_epi8(with_high_bit(shift_right(qs, 2), qh, first, 24, 3), table.places[2]);
    return _mm_or_si128(d, _mm512_castsi512_si128(_mm512_maskz_permutex2var_epi8(lanes_of(2, v), low, load_b(at_d_sq3), high)));
}

static inline vec_d unpack_sq2(const splitq_block_sq2 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    const vec_b high = load_b((const char *) x + 8);
    const vec_b q    = pick(load_b(x), high, at_qs_sq2);
    level[0] = _mm512_permutexvar_epi8(q, table.places[0]);
    level[1] = _mm512_permutexvar_epi8(q, table.places[1]);
    level[2] = _mm512_permutexvar_epi8(q, table.places[2]);
    level[3] = _mm512_permutexvar_epi8(shift_right(q, 2), table.places[2]);
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(2, v), load_b(at_d_sq2), high));
}

static inline void panel_sq4(const uint8_t * x, vec_t table, vec_b w[8]) {
    for (int i = 0; i < 4; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        w[i]     = _mm512_permutexvar_epi8(q, table.places[0]);
        w[i + 4] = _mm512_permutexvar_epi8(_mm512_srli_epi16(q, 4), table.places[0]);
    }
}

// Bit 4 of an index says that the group is shifted.
static inline void panel_sdr4(const uint8_t * x, vec_t table, vec_b w[8]) {
    const vec_b levels = _mm512_mask_mov_epi8(table.places[0], 0xffff0000ffff0000, doubled(table.places[0]));
    const vec_b code   = _mm512_set1_epi8(15);
    const vec_d d      = load_d(x + 16*LANES);
    const __mmask16 first  = _mm_cmpge_epu8_mask(d, _mm_set1_epi8((char) SDR_SHIFT_1ST));
    const __mmask16 second = _mm_mask_cmpge_epu8_mask(~first, d, _mm_set1_epi8((char) SDR_SHIFT_2ND));
    const vec_b bit0 = _mm512_maskz_set1_epi32(first,  0x10101010);
    const vec_b bit1 = _mm512_maskz_set1_epi32(second, 0x10101010);
    for (int i = 0; i < 4; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        w[i]     = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(q, code, bit0, 0xea), levels);
        w[i + 4] = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(_mm512_srli_epi16(q, 4), code, bit1, 0xea), levels);
    }
}

static inline void panel_sq3(const uint8_t * x, vec_t table, vec_b w[8]) {
    const int64_t first = 0x2322212003020100; // two rows
    const vec_b   qh    = load_b(x + 8*LANES);
    for (int i = 0; i < 2; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        w[i]     = _mm512_permutexvar_epi8(with_high_bit(q, qh, first, 4*i, 2), table.places[0]);
        w[i + 2] = _mm512_permutexvar_epi8(with_high_bit(q, qh, first, 4*i + 8, 4), table.places[1]);
        w[i + 4] = _mm512_permutexvar_epi8(with_high_bit(q, qh, first, 4*i + 16, 3), table.places[2]);
        w[i + 6] = _mm512_permutexvar_epi8(with_high_bit(_mm512_srli_epi16(q, 2), qh, first, 4*i + 24, 3), table.places[2]);
    }
}

static inline void panel_sq2(const uint8_t * x, vec_t table, vec_b w[8]) {
    for (int i = 0; i < 2; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        w[i]     = _mm512_permutexvar_epi8(q, table.places[0]);
        w[i + 2] = _mm512_permutexvar_epi8(q, table.places[1]);
        w[i + 4] = _mm512_permutexvar_epi8(q, table.places[2]);
        w[i + 6] = _mm512_permutexvar_epi8(_mm512_srli_epi16(q, 2), table.places[2]);
    }
}

static inline vec_w load_windows(const int8_t * levels) {
    return _mm512_xor_si512(load_b(levels), _mm512_set1_epi8((char) BIAS));
}

static inline vec_b set_8(const int8_t * y) {
    int64_t eight;
    memcpy(&eight, y, sizeof(eight));
    return _mm512_set1_epi64(eight);
}

static inline vec_b high_first(vec_b qh)  { return _mm512_unpacklo_epi32(qh, qh); }
static inline vec_b high_second(vec_b qh) { return _mm512_unpackhi_epi32(qh, qh); }

static inline vec_b later(vec_b high, const int bits)     { return bits == 4 ? _mm512_ror_epi64(high, 4) : _mm512_ror_epi64(high, 2); }
static inline vec_b odd_later(vec_b high, const int bits) { return _mm512_mask_blend_epi64(0xaa, high, later(high, bits)); }

// The levels of indices of 6 bits; where bit 4 of q is set the others of their pairs, turned: from a table of their own.
static inline vec_b look_up_128(vec_w table, vec_b index, vec_b q) {
    const vec_b each_other = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(table, 8), _mm512_slli_epi16(table, 8));
    const vec_b turned = _mm512_xor_si512(each_other, _mm512_set1_epi8(-1));
    const vec_b level  = _mm512_permutexvar_epi8(index, table);
    return _mm512_mask_permutexvar_epi8(level, _mm512_test_epi8_mask(q, _mm512_set1_epi8(16)), index, turned);
}

static inline void levels_6w(vec_b q, vec_b high, vec_w table, vec_b level[2]) {
    const vec_b own = _mm512_set1_epi8(15), next = _mm512_ror_epi64(q, 4);
    level[0] = look_up_128(table, _mm512_ternarylogic_epi64(own, q,    _mm512_slli_epi16(high, 4), 0xca), q);
    level[1] = look_up_128(table, _mm512_ternarylogic_epi64(own, next, _mm512_slli_epi16(high, 2), 0xca), next);
}

// high: qh twice in 64 bits, of which bit 4*k + i belongs to bit 4 of byte k.
static inline void levels_5w(vec_b q, vec_b high, vec_w table, vec_b level[2]) {
    const vec_b fifth = _mm512_set1_epi8(16), next = _mm512_ror_epi64(q, 4);
    const vec_b at = _mm512_set1_epi64(0x1814100c080400fc), at_next = _mm512_set1_epi64(0x1915110d090501fd);
    level[0] = look_up_128(table, _mm512_ternarylogic_epi64(fifth, _mm512_multishift_epi64_epi8(at,      high), q,    0xca), q);
    level[1] = look_up_128(table, _mm512_ternarylogic_epi64(fifth, _mm512_multishift_epi64_epi8(at_next, high), next, 0xca), next);
}

static inline void levels_4w(vec_b q, vec_w table, vec_b level[2]) {
    level[0] = _mm512_permutexvar_epi8(q, table);
    level[1] = _mm512_permutexvar_epi8(_mm512_ror_epi64(q, 4), table);
}

// high: qh twice in 64 bits, of which bits 4*k + i and the next one belong to bits 4 and 5 of byte k.
static inline vec_b with_high_bits(vec_b q, vec_b high, int i) {
    const vec_b at   = _mm512_add_epi8(_mm512_set1_epi64(0x1814100c080400fc), _mm512_set1_epi8((char) i));
    const vec_b bits = _mm512_multishift_epi64_epi8(at, high);
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(15), q, bits, 0xca);
}

// last: q, turned by 6 bits.
static inline void levels_3_of(vec_b q, vec_b last, vec_b high, vec_w table, vec_b level[4]) {
    level[0] = _mm512_permutexvar_epi8(with_high_bits(q, high, 0), table);
    level[1] = _mm512_permutexvar_epi8(with_high_bits(_mm512_srli_epi64(q, 2), high, 1), table);
    level[2] = _mm512_permutexvar_epi8(with_high_bits(_mm512_srli_epi64(q, 4), high, 2), table);
    level[3] = _mm512_permutexvar_epi8(with_high_bits(last, high, 3), table);
}

// later: q, turned by 4 bits.
static inline void levels_2_of(vec_b q, vec_b later, vec_w table, vec_b level[4]) {
    level[0] = _mm512_permutexvar_epi8(q, table);
    level[1] = _mm512_permutexvar_epi8(_mm512_srli_epi64(q, 2), table);
    level[2] = _mm512_permutexvar_epi8(later, table);
    level[3] = _mm512_permutexvar_epi8(_mm512_srli_epi64(later, 2), table);
}

static inline void levels_3w(vec_b q, vec_b high, vec_w table, vec_b level[4]) { levels_3_of(q, _mm512_ror_epi64(q, 6), high, table, level); }
static inline void levels_2w(vec_b q, vec_w table, vec_b level[4])             { levels_2_of(q, _mm512_ror_epi64(q, 4), table, level); }

// A word of 64 bits, to the right, `state` behind it.
#if defined(__AVX512VBMI2__)
#define SPLITQ_FOLLOWED(q, state, bits) _mm512_shrdi_epi64(q, state, bits)
#else
#define SPLITQ_FOLLOWED(q, state, bits) _mm512_ror_epi64(_mm512_ternarylogic_epi64(_mm512_set1_epi64((1 << (bits)) - 1), state, q, 0xca), bits)
#endif

static inline vec_b load_states(const uint8_t * d)              { return _mm512_cvtepu8_epi32(load_d(d)); }
static inline vec_b states_first(vec_b d, const int drop)       { const vec_b s = _mm512_srli_epi32(d, drop); return _mm512_unpacklo_epi32(s, s); }
static inline vec_b states_second(vec_b d, const int drop)      { const vec_b s = _mm512_srli_epi32(d, drop); return _mm512_unpackhi_epi32(s, s); }
static inline vec_b open_first(vec_b qh, vec_b d)  { return _mm512_unpacklo_epi32(qh, d); }
static inline vec_b open_second(vec_b qh, vec_b d) { return _mm512_unpackhi_epi32(qh, d); }

static inline void levels_3wo(vec_b q, vec_b high, vec_b state, vec_w table, vec_b level[4]) {
    GGML_UNUSED(state); // it is in the upper half of high, too, where it takes no shuffle
    levels_3_of(q, SPLITQ_FOLLOWED(q, _mm512_srli_epi64(high, 33), 6), high, table, level);
}

static inline void levels_2wo(vec_b q, vec_b state, vec_w table, vec_b level[4]) {
    levels_2_of(q, SPLITQ_FOLLOWED(q, state, 4), table, level);
}

static inline vec_d unpack_sq6w(const splitq_block_sq6w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    const vec_b low = load_b(x), high = load_b((const char *) x + 36);
    levels_6w(load_4bit_codes(x, sizeof(*x)), odd_later(pick(low, high, at_qh_sq6w), 4), table, level);
    return _mm_or_si128(d, _mm512_castsi512_si128(_mm512_maskz_permutex2var_epi8(lanes_of(1, v), low, load_b(at_d_sq6w), high)));
}

static inline vec_d unpack_sq5w(const splitq_block_sq5w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    const vec_b low = load_b(x), high = load_b((const char *) x + 20);
    levels_5w(load_4bit_codes(x, sizeof(*x)), odd_later(pick(low, high, at_qh_sq5w), 2), table, level);
    return _mm_or_si128(d, _mm512_castsi512_si128(_mm512_maskz_permutex2var_epi8(lanes_of(1, v), low, load_b(at_d_sq5w), high)));
}

static inline vec_d unpack_sq4w(const splitq_block_sq4w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    const vec_b high = load_b((const char *) x + 4);
    levels_4w(load_4bit_codes(x, sizeof(*x)), table, level);
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(1, v), load_b(at_d_sq4), high));
}

static inline vec_d unpack_sq3w(const splitq_block_sq3w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    const vec_b low  = load_b(x);
    const vec_b high = load_b((const char *) x + 40);
    levels_3w(pick(low, high, at_qs_sq3), pick(low, high, at_qh_sq3w), table, level);
    return _mm_or_si128(d, _mm512_castsi512_si128(_mm512_maskz_permutex2var_epi8(lanes_of(2, v), low, load_b(at_d_sq3), high)));
}

static inline vec_d unpack_sq2w(const splitq_block_sq2w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    const vec_b high = load_b((const char *) x + 8);
    levels_2w(pick(load_b(x), high, at_qs_sq2), table, level);
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(2, v), load_b(at_d_sq2), high));
}

static inline vec_d unpack_sq3wo(const splitq_block_sq3wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    const vec_b low  = load_b(x);
    const vec_b high = load_b((const char *) x + 40);
    levels_3wo(pick(low, high, at_qs_sq3), pick(low, high, at_qh_sq3wo), zero_i(), table, level);
    return _mm_or_si128(d, _mm512_castsi512_si128(_mm512_maskz_permutex2var_epi8(lanes_of(2, v), low, load_b(at_d_sq3), high)));
}

static inline vec_d unpack_sq2wo(const splitq_block_sq2wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    const vec_b low  = load_b(x);
    const vec_b high = load_b((const char *) x + 8);
    levels_2wo(pick(low, high, at_qs_sq2), pick(low, high, at_d_sq2wo), table, level);
    return _mm512_castsi512_si128(_mm512_mask_permutexvar_epi8(_mm512_castsi128_si512(d), lanes_of(2, v), load_b(at_d_sq2), high));
}

#elif defined(SPLITQ_AVX2) && defined(__F16C__)

#define LANES  8
#define TOKENS 16

#if defined(SPLITQ_AVX512)
#define BIAS 128
#define SPLITQ_DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define BIAS 128
#define SPLITQ_DPBUSD _mm256_dpbusd_avx_epi32
#else
#define BIAS 0
#endif

typedef __m256i  vec_b;
typedef __m256i  vec_i;
typedef __m256   vec_f;
typedef uint64_t vec_d;
typedef __m256i  vec_t;
typedef struct { vec_b turns[4]; } vec_w;

static inline vec_d load_d(const uint8_t * p) {
    vec_d d;
    memcpy(&d, p, sizeof(d));
    return d;
}

static inline vec_b load_b(const void * p)       { return _mm256_loadu_si256(p); }
static inline vec_i load_i(const int32_t * p)    { return _mm256_loadu_si256((const __m256i *) p); }
static inline vec_f load_f(const float * p)      { return _mm256_loadu_ps(p); }
static inline void  store_f(float * p, vec_f v)  { _mm256_storeu_ps(p, v); }
static inline vec_d zero_d(void)                 { return 0; }
static inline vec_i zero_i(void)                 { return _mm256_setzero_si256(); }
static inline vec_f zero_f(void)                 { return _mm256_setzero_ps(); }
static inline vec_i set_i(int32_t v)             { return _mm256_set1_epi32(v); }
static inline vec_f set_f(float v)               { return _mm256_set1_ps(v); }
static inline vec_i add_i(vec_i a, vec_i b)      { return _mm256_add_epi32(a, b); }
static inline vec_f mul_f(vec_f a, vec_f b)      { return _mm256_mul_ps(a, b); }
static inline vec_f to_f(vec_i a)                { return _mm256_cvtepi32_ps(a); }
static inline vec_f fma_f(vec_f a, vec_f b, vec_f c) { return _mm256_fmadd_ps(a, b, c); }
static inline float sum_f(vec_f a)               { return total(a, _mm256_setzero_ps()); }

static inline vec_i dot(vec_i sum, vec_b levels, vec_b y) {
#if BIAS
    return SPLITQ_DPBUSD(sum, levels, y);
#else
    return _mm256_add_epi32(sum, dot_signed(levels, y));
#endif
}

static inline vec_i dot_token(vec_i sum, const vec_b w[8], const int8_t * y) {
    for (int i = 0; i < 8; ++i) {
        int32_t four;
        memcpy(&four, y + 4*i, sizeof(four));
        sum = dot(sum, w[i], _mm256_set1_epi32(four));
    }
    return sum;
}

static inline vec_i reduce_1(const vec_i p[4]) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0], p[1]), _mm256_unpackhi_epi32(p[0], p[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(p[2], p[3]), _mm256_unpackhi_epi32(p[2], p[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

static inline vec_b evens(vec_b a, vec_b b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}

static inline vec_b odds(vec_b a, vec_b b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
}

static inline vec_i reduce_2(const vec_i p[2]) {
    return _mm256_add_epi32(evens(p[0], p[1]), odds(p[0], p[1]));
}

// Scale bytes as halves, 2^4 times too large.
static inline vec_f scale_f(vec_d d) {
    const __m128i word = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *) &d));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(word, 7), _mm_set1_epi16((short) 0xbfff)));
}

// The number's place is that of a scale's lowest bits in such a half, or `shift` bits further.
static inline vec_f scale_open(vec_d d, const int bits, const struct grid * grid) {
    const __m128i mask = _mm_set1_epi16((short) (0x8000 | ((2 << bits) - 1) << (7 + grid->shift)));
    const __m128i word = _mm_sll_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *) &d)), _mm_cvtsi32_si128(1 + bits + grid->shift));
    return _mm256_cvtph_ps(_mm_add_epi16(_mm_and_si128(word, mask), _mm_set1_epi16((short) (grid->base << 7))));
}

static inline vec_f scale_sdr4(vec_d d) {
    const __m128i bytes    = _mm_loadl_epi64((const __m128i *) &d);
    const vec_i   negated  = _mm256_cvtepu8_epi32(_mm_sub_epi8(bytes, _mm_set1_epi8(SDR_FINE)));
    const vec_i   negative = _mm256_cmpgt_epi32(set_i(SDR_FINE), negated);
    const vec_i   step     = add_i(_mm256_slli_epi32(_mm256_cvtepu8_epi32(sdr_index(bytes)), 21), set_i((127 - 15 + 4) << 23));
    return _mm256_castsi256_ps(_mm256_or_si256(step, _mm256_slli_epi32(negative, 31)));
}

static inline vec_t load_tables(const int8_t * levels, int n) {
    GGML_UNUSED(n);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels));
    return _mm256_xor_si256(table, _mm256_set1_epi8((char) BIAS));
}

static inline vec_d unpack_sq4(const splitq_block_sq4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    const vec_b m = _mm256_set1_epi8(15);
    const vec_b q = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) x[0].qs)),
                                            _mm_loadu_si128((const __m128i *) x[1].qs), 1);
    level[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(q, m));
    level[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 4), m));
    return d | (vec_d) x[0].d << 8*v | (vec_d) x[1].d << (8*v + 32);
}

static inline vec_b doubled_where(vec_b levels, vec_b where) {
    return _mm256_add_epi8(levels, _mm256_and_si256(where, _mm256_xor_si256(levels, _mm256_set1_epi8((char) BIAS))));
}

static inline vec_d unpack_sdr4(const splitq_block_sdr4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    d = unpack_sq4((const splitq_block_sq4 *) x, v, table, level, d);
    const __m256i own_d  = _mm256_setr_m128i(_mm_set1_epi32(x[0].d), _mm_set1_epi32(x[1].d));
    const __m256i first  = _mm256_cmpgt_epi32(own_d, set_i(SDR_SHIFT_1ST - 1));
    const __m256i either = _mm256_cmpgt_epi32(own_d, set_i(SDR_SHIFT_2ND - 1));
    level[0] = doubled_where(level[0], first);
    level[1] = doubled_where(level[1], _mm256_andnot_si256(first, either));
    return d;
}

// The first 8 bytes of four blocks.
#define SPLITQ_FOUR_QS(x) _mm256_setr_m128i( \
    _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *) &x[0])), (const __m64 *) &x[1])), \
    _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *) &x[2])), (const __m64 *) &x[3])))

#define SPLITQ_FOUR_D(x, v) ((vec_d) (x[0].d | x[1].d << 8) << 16*v | (vec_d) (x[2].d | x[3].d << 8) << (16*v + 32))

static inline vec_d unpack_sq3(const splitq_block_sq3 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    const vec_b qs = SPLITQ_FOUR_QS(x);
    int32_t high[4];
    for (int i = 0; i < 4; ++i) { memcpy(&high[i], x[i].qh, 4); }
    const vec_b qh  = _mm256_cvtepu32_epi64(_mm_setr_epi32(high[0], high[1], high[2], high[3]));
    const vec_b bit = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    for (int i = 0; i < 4; ++i) {
        const vec_b byte = _mm256_setr_epi64x(0x0101010101010101*i, 0x0101010101010101*(i + 8), 0x0101010101010101*i, 0x0101010101010101*(i + 8));
        const vec_b set  = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(qh, byte), bit), bit);
        const vec_b low  = _mm256_and_si256(_mm256_srli_epi16(qs, 2*i), _mm256_set1_epi8(3));
        level[i] = _mm256_shuffle_epi8(table, _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4))));
    }
    return d | SPLITQ_FOUR_D(x, v);
}

static inline vec_d unpack_sq2(const splitq_block_sq2 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    const vec_b qs = SPLITQ_FOUR_QS(x);
    for (int i = 0; i < 4; ++i) {
        level[i] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(qs, 2*i), _mm256_set1_epi8(3)));
    }
    return d | SPLITQ_FOUR_D(x, v);
}

static inline void panel_sq4(const uint8_t * x, vec_t table, vec_b w[8]) {
    const vec_b m = _mm256_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        w[i]     = _mm256_shuffle_epi8(table, _mm256_and_si256(q, m));
        w[i + 4] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 4), m));
    }
}

static inline void panel_sdr4(const uint8_t * x, vec_t table, vec_b w[8]) {
    const vec_i d      = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (x + 16*LANES)));
    const vec_b first  = _mm256_cmpgt_epi32(d, set_i(SDR_SHIFT_1ST - 1));
    const vec_b either = _mm256_cmpgt_epi32(d, set_i(SDR_SHIFT_2ND - 1));
    panel_sq4(x, table, w);
    for (int i = 0; i < 4; ++i) {
        w[i]     = doubled_where(w[i], first);
        w[i + 4] = doubled_where(w[i + 4], _mm256_andnot_si256(first, either));
    }
}

static inline void panel_sq3(const uint8_t * x, vec_t table, vec_b w[8]) {
    const vec_b qh = load_b(x + 8*LANES);
    for (int i = 0; i < 2; ++i) {
        const vec_b q   = load_b(x + 4*LANES*i);
        const vec_b bit = _mm256_set1_epi32((int) (0x08040201u << 4*i)); // of byte k: 4*i + k
        for (int p = 0; p < 4; ++p) {
            const vec_b row  = _mm256_setr_epi32(0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c, 0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c);
            const vec_b byte = _mm256_shuffle_epi8(qh, _mm256_add_epi8(row, _mm256_set1_epi8((char) p)));
            const vec_b high = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit), _mm256_set1_epi8(4));
            const vec_b low  = _mm256_and_si256(_mm256_srli_epi16(q, 2*p), _mm256_set1_epi8(3));
            w[i + 2*p] = _mm256_shuffle_epi8(table, _mm256_or_si256(low, high));
        }
    }
}

static inline void panel_sq2(const uint8_t * x, vec_t table, vec_b w[8]) {
    for (int i = 0; i < 2; ++i) {
        const vec_b q = load_b(x + 4*LANES*i);
        for (int p = 0; p < 4; ++p) {
            w[i + 2*p] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 2*p), _mm256_set1_epi8(3)));
        }
    }
}

// A shuffle gives 0 for a negative index: three further ones turn the levels of the first 16 indices into those of the next.
// By adding and by xor in turn, or gcc 12 regroups them, finds all before it joins any, and runs out of registers.
static inline vec_w load_windows(const int8_t * levels) {
    vec_b part[4];
    for (int i = 0; i < 4; ++i) { part[i] = load_tables(levels + 16*i, 16); }
    return (vec_w) { { part[0], _mm256_xor_si256(part[1], part[0]), _mm256_sub_epi8(part[2], part[1]), _mm256_xor_si256(part[3], part[2]) } };
}

static inline vec_b turn_of(vec_w table, vec_b index, const int i) {
    return _mm256_shuffle_epi8(table.turns[i], _mm256_sub_epi8(index, _mm256_set1_epi8((char) (16*i))));
}

static inline vec_b look_up_64(vec_w table, vec_b index) {
    const vec_b first = _mm256_xor_si256(_mm256_shuffle_epi8(table.turns[0], index), turn_of(table, index, 1));
    return _mm256_xor_si256(_mm256_add_epi8(first, turn_of(table, index, 2)), turn_of(table, index, 3));
}

static inline vec_b low_6(vec_b q) {
    return _mm256_and_si256(q, _mm256_set1_epi8(63));
}

static inline vec_b rotated(vec_b q, const int bits) {
#if defined(SPLITQ_AVX512)
    return bits == 4 ? _mm256_ror_epi64(q, 4) : _mm256_ror_epi64(q, 6);
#else
    return _mm256_or_si256(_mm256_srli_epi64(q, bits), _mm256_slli_epi64(q, 64 - bits));
#endif
}

static inline vec_b set_8(const int8_t * y) {
    int64_t eight;
    memcpy(&eight, y, sizeof(eight));
    return _mm256_set1_epi64x(eight);
}

// Byte k of a row's 64 bits: bits 4*k .. 4*k + 7 of its qh.
static inline vec_b half_a_byte_later(vec_b qh)  { return _mm256_or_si256(_mm256_srli_epi32(qh, 4), _mm256_slli_epi32(qh, 28)); }
static inline vec_b high_first(vec_b qh)  { return _mm256_unpacklo_epi8(qh, half_a_byte_later(qh)); }
static inline vec_b high_second(vec_b qh) { return _mm256_unpackhi_epi8(qh, half_a_byte_later(qh)); }

static inline vec_b later(vec_b high, const int bits)     { return _mm256_srli_epi16(high, bits); } // what is left of each byte is enough
static inline vec_b odd_later(vec_b high, const int bits) { return _mm256_srlv_epi64(high, _mm256_setr_epi64x(0, bits, 0, bits)); }

// The levels of indices of 6 bits; where bit 4 of q is set the others of their pairs, turned.
static inline vec_b look_up_128(vec_w table, vec_b index, vec_b q) {
    const vec_b turn = _mm256_cmpgt_epi8(_mm256_setzero_si256(), _mm256_slli_epi16(q, 3));
    const vec_b pair = _mm256_and_si256(turn, _mm256_set1_epi8(1));
    return _mm256_xor_si256(look_up_64(table, _mm256_xor_si256(index, pair)), turn);
}

static inline void levels_6w(vec_b q, vec_b high, vec_w table, vec_b level[2]) {
    const vec_b own = _mm256_set1_epi8(15), above = _mm256_set1_epi8(48), next = rotated(q, 4);
    level[0] = look_up_128(table, _mm256_or_si256(_mm256_and_si256(q,    own), _mm256_and_si256(_mm256_slli_epi16(high, 4), above)), q);
    level[1] = look_up_128(table, _mm256_or_si256(_mm256_and_si256(next, own), _mm256_and_si256(_mm256_slli_epi16(high, 2), above)), next);
}

static inline void levels_5w(vec_b q, vec_b high, vec_w table, vec_b level[2]) {
    const vec_b others = _mm256_set1_epi8(47), fifth = _mm256_set1_epi8(16), next = rotated(q, 4);
    level[0] = look_up_128(table, _mm256_or_si256(_mm256_and_si256(q,    others), _mm256_and_si256(_mm256_slli_epi16(high, 4), fifth)), q);
    level[1] = look_up_128(table, _mm256_or_si256(_mm256_and_si256(next, others), _mm256_and_si256(_mm256_slli_epi16(high, 3), fifth)), next);
}

static inline void levels_4w(vec_b q, vec_w table, vec_b level[2]) {
    level[0] = look_up_64(table, low_6(q));
    level[1] = look_up_64(table, low_6(rotated(q, 4)));
}

// In sq3w's table entry i ^ 32 is -1 - entry i, all bits turned, so the first half is enough.
static inline void levels_3_of(vec_b q, vec_b last, vec_b high, vec_w table, vec_b level[4]) {
    for (int i = 0; i < 4; ++i) {
        const vec_b later = i < 3 ? _mm256_srli_epi16(q, 2*i) : last; // four bits are in one byte, but for the last
        const vec_b low   = _mm256_and_si256(later, _mm256_set1_epi8(15));
        const vec_b bit_4 = _mm256_andnot_si256(_mm256_slli_epi16(high, 7 - i), _mm256_set1_epi8((char) 128)); // negative without it
        const vec_b bit_5 = _mm256_cmpgt_epi8(_mm256_setzero_si256(), _mm256_slli_epi16(high, 6 - i));
        const vec_b turn  = _mm256_shuffle_epi8(table.turns[1], _mm256_or_si256(low, bit_4));
        level[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_shuffle_epi8(table.turns[0], low), turn), bit_5);
    }
}

static inline void levels_2_of(vec_b q, vec_b later, vec_w table, vec_b level[4]) {
    level[0] = look_up_64(table, low_6(q));
    level[1] = look_up_64(table, low_6(_mm256_srli_epi16(q, 2)));
    level[2] = look_up_64(table, low_6(later));
    level[3] = look_up_64(table, low_6(_mm256_srli_epi16(later, 2)));
}

static inline void levels_3w(vec_b q, vec_b high, vec_w table, vec_b level[4]) { levels_3_of(q, rotated(q, 6), high, table, level); }
static inline void levels_2w(vec_b q, vec_w table, vec_b level[4])             { levels_2_of(q, rotated(q, 4), table, level); }

// A word of 64 bits, to the right, `state` behind it.
static inline vec_b followed(vec_b q, vec_b state, const int bits) {
    return _mm256_or_si256(_mm256_srli_epi64(q, bits), _mm256_slli_epi64(state, 64 - bits));
}

static inline vec_b load_states(const uint8_t * d)              { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) d)); }
static inline vec_b states_first(vec_b d, const int drop)       { const vec_b s = _mm256_srli_epi32(d, drop); return _mm256_unpacklo_epi32(s, s); }
static inline vec_b states_second(vec_b d, const int drop)      { const vec_b s = _mm256_srli_epi32(d, drop); return _mm256_unpackhi_epi32(s, s); }
static inline vec_b open_later(vec_b qh, vec_b d)  { return _mm256_or_si256(_mm256_srli_epi32(qh, 4), _mm256_slli_epi32(d, 28)); }
static inline vec_b open_first(vec_b qh, vec_b d)  { return _mm256_unpacklo_epi8(qh, open_later(qh, d)); }
static inline vec_b open_second(vec_b qh, vec_b d) { return _mm256_unpackhi_epi8(qh, open_later(qh, d)); }

static inline void levels_3wo(vec_b q, vec_b high, vec_b state, vec_w table, vec_b level[4]) { levels_3_of(q, followed(q, state, 6), high, table, level); }
static inline void levels_2wo(vec_b q, vec_b state, vec_w table, vec_b level[4])             { levels_2_of(q, followed(q, state, 4), table, level); }

#define SPLITQ_TWO_Q(x) _mm256_setr_m128i(_mm_loadu_si128((const __m128i *) x[0].q), _mm_loadu_si128((const __m128i *) x[1].q))

static inline vec_d unpack_sq6w(const splitq_block_sq6w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    int64_t high[2];
    for (int i = 0; i < 2; ++i) { memcpy(&high[i], x[i].qh, 8); }
    levels_6w(SPLITQ_TWO_Q(x), odd_later(_mm256_setr_epi64x(high[0], high[0], high[1], high[1]), 4), table, level);
    return d | (vec_d) x[0].d << 8*v | (vec_d) x[1].d << (8*v + 32);
}

static inline vec_d unpack_sq5w(const splitq_block_sq5w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    int32_t high[2];
    for (int i = 0; i < 2; ++i) { memcpy(&high[i], x[i].qh, 4); }
    const vec_b qh = _mm256_setr_epi32(high[0], high[0], 0, 0, high[1], high[1], 0, 0);
    levels_5w(SPLITQ_TWO_Q(x), odd_later(high_first(qh), 2), table, level);
    return d | (vec_d) x[0].d << 8*v | (vec_d) x[1].d << (8*v + 32);
}

static inline vec_d unpack_sq4w(const splitq_block_sq4w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    levels_4w(SPLITQ_TWO_Q(x), table, level);
    return d | (vec_d) x[0].d << 8*v | (vec_d) x[1].d << (8*v + 32);
}

static inline vec_d unpack_sq3w(const splitq_block_sq3w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    int32_t high[4];
    for (int i = 0; i < 4; ++i) { memcpy(&high[i], x[i].qh, 4); }
    levels_3w(SPLITQ_FOUR_QS(x), high_first(_mm256_setr_epi32(high[0], high[1], 0, 0, high[2], high[3], 0, 0)), table, level);
    return d | SPLITQ_FOUR_D(x, v);
}

static inline vec_d unpack_sq2w(const splitq_block_sq2w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    levels_2w(SPLITQ_FOUR_QS(x), table, level);
    return d | SPLITQ_FOUR_D(x, v);
}

#define SPLITQ_FOUR_STATES(x) _mm256_setr_epi32(x[0].d, x[1].d, 0, 0, x[2].d, x[3].d, 0, 0)

static inline vec_d unpack_sq3wo(const splitq_block_sq3wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    int32_t high[4];
    for (int i = 0; i < 4; ++i) { memcpy(&high[i], x[i].qh, 4); }
    const vec_b qh = _mm256_setr_epi32(high[0], high[1], 0, 0, high[2], high[3], 0, 0), state = SPLITQ_FOUR_STATES(x);
    levels_3wo(SPLITQ_FOUR_QS(x), open_first(qh, state), states_first(state, 1), table, level);
    return d | SPLITQ_FOUR_D(x, v);
}

static inline vec_d unpack_sq2wo(const splitq_block_sq2wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    levels_2wo(SPLITQ_FOUR_QS(x), states_first(SPLITQ_FOUR_STATES(x), 0), table, level);
    return d | SPLITQ_FOUR_D(x, v);
}

#elif defined(SPLITQ_NEON) && defined(__ARM_FEATURE_DOTPROD)

#define LANES  4
#define TOKENS 8
#define BIAS   0

typedef int8x16_t   vec_b;
typedef int32x4_t   vec_i;
typedef float32x4_t vec_f;
typedef uint32_t    vec_d;
typedef int8x16_t   vec_t;
typedef int8x16x4_t vec_w;

static inline vec_d load_d(const uint8_t * p) {
    vec_d d;
    memcpy(&d, p, sizeof(d));
    return d;
}

static inline vec_b load_b(const void * p)       { return vld1q_s8(p); }
static inline vec_i load_i(const int32_t * p)    { return vld1q_s32(p); }
static inline vec_f load_f(const float * p)      { return vld1q_f32(p); }
static inline void  store_f(float * p, vec_f v)  { vst1q_f32(p, v); }
static inline vec_d zero_d(void)                 { return 0; }
static inline vec_i zero_i(void)                 { return vdupq_n_s32(0); }
static inline vec_f zero_f(void)                 { return vdupq_n_f32(0); }
static inline vec_i set_i(int32_t v)             { return vdupq_n_s32(v); }
static inline vec_f set_f(float v)               { return vdupq_n_f32(v); }
static inline vec_i add_i(vec_i a, vec_i b)      { return vaddq_s32(a, b); }
static inline vec_f mul_f(vec_f a, vec_f b)      { return vmulq_f32(a, b); }
static inline vec_f to_f(vec_i a)                { return vcvtq_f32_s32(a); }
static inline vec_f fma_f(vec_f a, vec_f b, vec_f c) { return vfmaq_f32(c, a, b); }
static inline float sum_f(vec_f a)               { return vaddvq_f32(a); }
static inline vec_i dot(vec_i sum, vec_b a, vec_b b) { return vdotq_s32(sum, a, b); }

static inline vec_i dot_token(vec_i sum, const vec_b w[8], const int8_t * y) {
    const int8x16_t low = vld1q_s8(y), high = vld1q_s8(y + 16);
    sum = vdotq_laneq_s32(sum, w[0], low, 0);
    sum = vdotq_laneq_s32(sum, w[1], low, 1);
    sum = vdotq_laneq_s32(sum, w[2], low, 2);
    sum = vdotq_laneq_s32(sum, w[3], low, 3);
    sum = vdotq_laneq_s32(sum, w[4], high, 0);
    sum = vdotq_laneq_s32(sum, w[5], high, 1);
    sum = vdotq_laneq_s32(sum, w[6], high, 2);
    return vdotq_laneq_s32(sum, w[7], high, 3);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

#define SPLITQ_PAIRS_TOKENS

// Of a block of two tokens: 8 activations of one and 8 of the other in turn.
static inline void pair(int8_t * y0, int8_t * y1) {
    const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(y0)), a2 = vreinterpretq_s64_s8(vld1q_s8(y0 + 16));
    const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(y1)), b2 = vreinterpretq_s64_s8(vld1q_s8(y1 + 16));
    vst1q_s8(y0,      vreinterpretq_s8_s64(vzip1q_s64(a, b)));
    vst1q_s8(y0 + 16, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
    vst1q_s8(y1,      vreinterpretq_s8_s64(vzip1q_s64(a2, b2)));
    vst1q_s8(y1 + 16, vreinterpretq_s8_s64(vzip2q_s64(a2, b2)));
}

// Each vector becomes 8 weights of two rows.
static inline void arrange(vec_b w[8]) {
    for (int i = 0; i < 8; i += 2) {
        const int32x4_t a = vreinterpretq_s32_s8(w[i]), b = vreinterpretq_s32_s8(w[i + 1]);
        w[i]     = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        w[i + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
}

static inline void dot_pair(vec_i sum[2], const vec_b w[8], const int8_t * y0, const int8_t * y1) {
    int32x4_t first = vdupq_n_s32(0), second = first; // token by token, rows 0 and 1, rows 2 and 3
    for (int i = 0; i < 4; ++i) {
        const int8x16_t y = vld1q_s8((i < 2 ? y0 : y1) + 16*(i%2));
        first  = vmmlaq_s32(first,  y, w[2*i]);
        second = vmmlaq_s32(second, y, w[2*i + 1]);
    }
    const int64x2_t a = vreinterpretq_s64_s32(first), b = vreinterpretq_s64_s32(second);
    sum[0] = vreinterpretq_s32_s64(vzip1q_s64(a, b)); // there is no bias to add to
    sum[1] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
}

#endif

static inline vec_i reduce_1(const vec_i p[4]) {
    return vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]));
}

static inline vec_i reduce_2(const vec_i p[2]) {
    return vpaddq_s32(p[0], p[1]);
}

// Scale bytes as halves, 2^4 times too large.
static inline vec_f scale_f(vec_d d) {
    const int16x4_t word = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(d))));
    return vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vshl_n_s16(word, 7), vdup_n_s16((int16_t) 0xbfff))));
}

// The number's place is that of a scale's lowest bits in such a half, or `shift` bits further.
static inline vec_f scale_open(vec_d d, const int bits, const struct grid * grid) {
    const int16x4_t mask = vdup_n_s16((int16_t) (0x8000 | ((2 << bits) - 1) << (7 + grid->shift)));
    const int16x4_t word = vshl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(d)))), vdup_n_s16((int16_t) (1 + bits + grid->shift)));
    return vcvt_f32_f16(vreinterpret_f16_s16(vadd_s16(vand_s16(word, mask), vdup_n_s16((int16_t) (grid->base << 7)))));
}

// Of bytes d: the index of the step where every octave has 4. A difference below 0 wraps around, to one that is larger.
static inline vec_f scale_sdr4(vec_d d) {
    const uint8x8_t bytes  = vreinterpret_u8_u32(vdup_n_u32(d)), negated = vsub_u8(bytes, vdup_n_u8(SDR_FINE));
    const uint8x8_t coarse = vmin_u8(vsub_u8(bytes, vdup_n_u8(SDR_SHIFT_2ND)), vsub_u8(bytes, vdup_n_u8(SDR_SHIFT_1ST)));
    const uint8x8_t index  = vmin_u8(vmin_u8(bytes, negated), vqadd_u8(coarse, coarse));
    const uint8x8_t sign   = vclt_u8(negated, vdup_n_u8(SDR_FINE));
    const uint32x4_t step  = vaddq_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(index))), 21), vdupq_n_u32((127 - 15 + 4) << 23));
    return vreinterpretq_f32_u32(vorrq_u32(step, vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(sign))), 31)));
}

static inline vec_t load_tables(const int8_t * levels, int n) {
    GGML_UNUSED(n);
    return vld1q_s8(levels);
}

static inline vec_d unpack_sq4(const splitq_block_sq4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    const uint8x16_t q = vld1q_u8(x->qs);
    level[0] = vqtbl1q_s8(table, vandq_u8(q, vdupq_n_u8(15)));
    level[1] = vqtbl1q_s8(table, vshrq_n_u8(q, 4));
    return d | (vec_d) x->d << 8*v;
}

// Codes are their own levels: from the upper half of a byte, to their place and, if shifted, one further.
static inline vec_d unpack_sdr4(const splitq_block_sdr4 * x, int v, vec_t table, vec_b level[2], vec_d d) {
    GGML_UNUSED(table);
    const int8x16_t q = vreinterpretq_s8_u8(vld1q_u8(x->qs));
    const bool first = x->d >= SDR_SHIFT_1ST, second = x->d >= SDR_SHIFT_2ND && !first;
    level[0] = vshlq_s8(vshlq_n_s8(q, 4), vdupq_n_s8(first - 4));
    level[1] = vshlq_s8(vandq_s8(q, vdupq_n_s8((int8_t) 0xf0)), vdupq_n_s8(second - 4));
    return d | (vec_d) x->d << 8*v;
}

// The four codes of each byte.
static inline void codes_2bit(const uint8_t * a, const uint8_t * b, uint8x16_t code[4]) {
    const uint8x16_t q = vcombine_u8(vld1_u8(a), vld1_u8(b)), m = vdupq_n_u8(3);
    code[0] = vandq_u8(q, m);
    code[1] = vandq_u8(vshrq_n_u8(q, 2), m);
    code[2] = vandq_u8(vshrq_n_u8(q, 4), m);
    code[3] = vshrq_n_u8(q, 6);
}

static inline vec_d unpack_sq3(const splitq_block_sq3 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    static const int8_t to_bit_2[16] = { 2, 1, 0, -1, -2, -3, -4, -5, 2, 1, 0, -1, -2, -3, -4, -5 };
    const int8x16_t  shift = vld1q_s8(to_bit_2);
    const uint8x16_t four  = vdupq_n_u8(4);
    uint8x16_t code[4];
    codes_2bit(x[0].qs, x[1].qs, code);
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t high = vshlq_u8(vcombine_u8(vdup_n_u8(x[0].qh[i]), vdup_n_u8(x[1].qh[i])), shift);
        level[i] = vqtbl1q_s8(table, vbslq_u8(four, high, code[i]));
    }
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

static inline vec_d unpack_sq2(const splitq_block_sq2 * x, int v, vec_t table, vec_b level[4], vec_d d) {
    uint8x16_t code[4];
    codes_2bit(x[0].qs, x[1].qs, code);
    for (int i = 0; i < 4; ++i) { level[i] = vqtbl1q_s8(table, code[i]); }
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

static inline void panel_sq4(const uint8_t * x, vec_t table, vec_b w[8]) {
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t q = vld1q_u8(x + 4*LANES*i);
        w[i]     = vqtbl1q_s8(table, vandq_u8(q, vdupq_n_u8(15)));
        w[i + 4] = vqtbl1q_s8(table, vshrq_n_u8(q, 4));
    }
}

static inline void panel_sdr4(const uint8_t * x, vec_t table, vec_b w[8]) {
    GGML_UNUSED(table);
    static const uint8_t rows[16] = { 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3 };
    const uint8x16_t d      = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(load_d(x + 16*LANES))), vld1q_u8(rows));
    const uint8x16_t first  = vcgeq_u8(d, vdupq_n_u8(SDR_SHIFT_1ST));
    const uint8x16_t second = vbicq_u8(vcgeq_u8(d, vdupq_n_u8(SDR_SHIFT_2ND)), first);
    const int8x16_t  shift0 = vsubq_s8(vdupq_n_s8(-4), vreinterpretq_s8_u8(first)); // true is -1
    const int8x16_t  shift1 = vsubq_s8(vdupq_n_s8(-4), vreinterpretq_s8_u8(second));
    for (int i = 0; i < 4; ++i) {
        const int8x16_t q = vreinterpretq_s8_u8(vld1q_u8(x + 4*LANES*i));
        w[i]     = vshlq_s8(vshlq_n_s8(q, 4), shift0);
        w[i + 4] = vshlq_s8(vandq_s8(q, vdupq_n_s8((int8_t) 0xf0)), shift1);
    }
}

static inline void panel_sq3(const uint8_t * x, vec_t table, vec_b w[8]) {
    static const uint8_t rows[16] = { 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12 };
    const uint8x16_t qh = vld1q_u8(x + 8*LANES), row = vld1q_u8(rows), four = vdupq_n_u8(4);
    for (int i = 0; i < 2; ++i) {
        const int8x16_t shift = vreinterpretq_s8_u32(vdupq_n_u32(i ? 0xfbfcfdfe : 0xff000102)); // of byte k: bit 4*i + k to bit 2
        uint8x16_t code[4];
        codes_2bit(x + 4*LANES*i, x + 4*LANES*i + 8, code);
        for (int p = 0; p < 4; ++p) {
            const uint8x16_t high = vshlq_u8(vqtbl1q_u8(qh, vaddq_u8(row, vdupq_n_u8((uint8_t) p))), shift);
            w[i + 2*p] = vqtbl1q_s8(table, vbslq_u8(four, high, code[p]));
        }
    }
}

static inline void panel_sq2(const uint8_t * x, vec_t table, vec_b w[8]) {
    for (int i = 0; i < 2; ++i) {
        uint8x16_t code[4];
        codes_2bit(x + 4*LANES*i, x + 4*LANES*i + 8, code);
        for (int p = 0; p < 4; ++p) { w[i + 2*p] = vqtbl1q_s8(table, code[p]); }
    }
}

static inline vec_w load_windows(const int8_t * levels) {
    vec_w table = {{ vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48) }};
#if defined(__GNUC__) && !defined(__clang__)
    __asm__("" : "+w"(table)); // gcc 12 loads the four registers anew for each look-up if it knows what is in them
#endif
    return table;
}

static inline vec_b look_up_64(vec_w table, uint8x16_t index) {
    return vqtbl4q_s8(table, vandq_u8(index, vdupq_n_u8(63)));
}

#define SPLITQ_ROTATED(q, bits) vreinterpretq_u8_u64(vsliq_n_u64( \
    vshrq_n_u64(vreinterpretq_u64_u8(q), bits), vreinterpretq_u64_u8(q), 64 - (bits)))

static inline vec_b set_8(const int8_t * y) {
    return vreinterpretq_s8_s64(vld1q_dup_s64((const int64_t *) y));
}

static inline vec_b evens(vec_b a, vec_b b) { return vreinterpretq_s8_s32(vuzp1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b))); }
static inline vec_b odds(vec_b a, vec_b b)  { return vreinterpretq_s8_s32(vuzp2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b))); }

// Byte k of a row's 64 bits: bits 4*k .. 4*k + 7 of its qh.
static inline vec_b half_a_byte_later(vec_b qh) {
    const uint32x4_t word = vreinterpretq_u32_s8(qh);
    return vreinterpretq_s8_u32(vsliq_n_u32(vshrq_n_u32(word, 4), word, 28));
}

static inline vec_b high_first(vec_b qh)  { return vzip1q_s8(qh, half_a_byte_later(qh)); }
static inline vec_b high_second(vec_b qh) { return vzip2q_s8(qh, half_a_byte_later(qh)); }

static inline vec_b later(vec_b high, const int bits) {
    return vreinterpretq_s8_u8(vshlq_u8(vreinterpretq_u8_s8(high), vdupq_n_s8((int8_t) -bits)));
}

static inline vec_b odd_later(vec_b high, const int bits) {
    const int8x16_t shift = vcombine_s8(vdup_n_s8(0), vdup_n_s8((int8_t) -bits));
    return vreinterpretq_s8_u8(vshlq_u8(vreinterpretq_u8_s8(high), shift));
}

// The levels of indices of 6 bits; where bit 4 of q is set the others of their pairs, turned.
static inline vec_b look_up_128(vec_w table, uint8x16_t index, uint8x16_t q) {
    const uint8x16_t turn = vtstq_u8(q, vdupq_n_u8(16)), pair = vandq_u8(turn, vdupq_n_u8(1));
    return veorq_s8(vqtbl4q_s8(table, veorq_u8(index, pair)), vreinterpretq_s8_u8(turn));
}

static inline void levels_6w(vec_b words, vec_b high, vec_w table, vec_b level[2]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words), next = SPLITQ_ROTATED(q, 4), h = vreinterpretq_u8_s8(high);
    const uint8x16_t own = vdupq_n_u8(15), two = vdupq_n_u8(3);
    level[0] = look_up_128(table, vorrq_u8(vandq_u8(q,    own), vshlq_n_u8(vandq_u8(h, two), 4)),                 q);
    level[1] = look_up_128(table, vorrq_u8(vandq_u8(next, own), vshlq_n_u8(vandq_u8(vshrq_n_u8(h, 2), two), 4)), next);
}

static inline void levels_5w(vec_b words, vec_b high, vec_w table, vec_b level[2]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words), next = SPLITQ_ROTATED(q, 4), h = vreinterpretq_u8_s8(high);
    const uint8x16_t others = vdupq_n_u8(47), fifth = vdupq_n_u8(16);
    level[0] = look_up_128(table, vorrq_u8(vandq_u8(q,    others), vandq_u8(vshlq_n_u8(h, 4), fifth)), q);
    level[1] = look_up_128(table, vorrq_u8(vandq_u8(next, others), vandq_u8(vshlq_n_u8(h, 3), fifth)), next);
}

static inline void levels_4w(vec_b words, vec_w table, vec_b level[2]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words);
    level[0] = look_up_64(table, q);
    level[1] = look_up_64(table, SPLITQ_ROTATED(q, 4));
}

static inline void levels_3_of(uint8x16_t q, uint8x16_t last, vec_b high, vec_w table, vec_b level[4]) {
    const uint8x16_t h = vreinterpretq_u8_s8(high);
    level[0] = look_up_64(table, vsliq_n_u8(q, h, 4));
    level[1] = look_up_64(table, vsliq_n_u8(vshrq_n_u8(q, 2), vshrq_n_u8(h, 1), 4)); // four bits are in one byte, but for the last
    level[2] = look_up_64(table, vsliq_n_u8(vshrq_n_u8(q, 4), vshrq_n_u8(h, 2), 4));
    level[3] = look_up_64(table, vsliq_n_u8(last, vshrq_n_u8(h, 3), 4));
}

static inline void levels_2_of(uint8x16_t q, uint8x16_t later, vec_w table, vec_b level[4]) {
    level[0] = look_up_64(table, q);
    level[1] = vqtbl4q_s8(table, vshrq_n_u8(q, 2));
    level[2] = look_up_64(table, later);
    level[3] = vqtbl4q_s8(table, vshrq_n_u8(later, 2));
}

static inline void levels_3w(vec_b words, vec_b high, vec_w table, vec_b level[4]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words);
    levels_3_of(q, SPLITQ_ROTATED(q, 6), high, table, level);
}

static inline void levels_2w(vec_b words, vec_w table, vec_b level[4]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words);
    levels_2_of(q, SPLITQ_ROTATED(q, 4), table, level);
}

// A word of 64 bits, to the right, `state` behind it.
#define SPLITQ_FOLLOWED(q, state, bits) vreinterpretq_u8_u64(vsliq_n_u64( \
    vshrq_n_u64(vreinterpretq_u64_u8(q), bits), vreinterpretq_u64_s8(state), 64 - (bits)))

static inline vec_b load_states(const uint8_t * d) {
    return vreinterpretq_s8_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(load_d(d)))))));
}

static inline uint32x4_t dropped(vec_b d, const int drop) { return vshlq_u32(vreinterpretq_u32_s8(d), vdupq_n_s32(-drop)); }
static inline vec_b states_first(vec_b d, const int drop)  { return vreinterpretq_s8_u32(vzip1q_u32(dropped(d, drop), dropped(d, drop))); }
static inline vec_b states_second(vec_b d, const int drop) { return vreinterpretq_s8_u32(vzip2q_u32(dropped(d, drop), dropped(d, drop))); }
static inline vec_b open_later(vec_b qh, vec_b d)  { return vreinterpretq_s8_u32(vsliq_n_u32(vshrq_n_u32(vreinterpretq_u32_s8(qh), 4), vreinterpretq_u32_s8(d), 28)); }
static inline vec_b open_first(vec_b qh, vec_b d)  { return vzip1q_s8(qh, open_later(qh, d)); }
static inline vec_b open_second(vec_b qh, vec_b d) { return vzip2q_s8(qh, open_later(qh, d)); }

static inline void levels_3wo(vec_b words, vec_b high, vec_b state, vec_w table, vec_b level[4]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words);
    levels_3_of(q, SPLITQ_FOLLOWED(q, state, 6), high, table, level);
}

static inline void levels_2wo(vec_b words, vec_b state, vec_w table, vec_b level[4]) {
    const uint8x16_t q = vreinterpretq_u8_s8(words);
    levels_2_of(q, SPLITQ_FOLLOWED(q, state, 4), table, level);
}

static inline vec_d unpack_sq6w(const splitq_block_sq6w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    const int8x8_t qh = vld1_s8((const int8_t *) x->qh);
    levels_6w(load_b(x->q), odd_later(vcombine_s8(qh, qh), 4), table, level);
    return d | (vec_d) x->d << 8*v;
}

static inline vec_d unpack_sq5w(const splitq_block_sq5w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    uint32_t high;
    memcpy(&high, x->qh, 4);
    levels_5w(load_b(x->q), odd_later(high_first(vreinterpretq_s8_u32(vdupq_n_u32(high))), 2), table, level);
    return d | (vec_d) x->d << 8*v;
}

static inline vec_d unpack_sq4w(const splitq_block_sq4w * x, int v, vec_w table, vec_b level[2], vec_d d) {
    levels_4w(load_b(x->q), table, level);
    return d | (vec_d) x->d << 8*v;
}

static inline vec_d unpack_sq3w(const splitq_block_sq3w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    uint32_t high[2];
    memcpy(&high[0], x[0].qh, 4);
    memcpy(&high[1], x[1].qh, 4);
    const uint32x2_t qh = vset_lane_u32(high[1], vdup_n_u32(high[0]), 1);
    levels_3w(vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x[0].q), vld1_u8(x[1].q))), high_first(vreinterpretq_s8_u32(vcombine_u32(qh, qh))), table, level);
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

static inline vec_d unpack_sq2w(const splitq_block_sq2w * x, int v, vec_w table, vec_b level[4], vec_d d) {
    levels_2w(vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x[0].q), vld1_u8(x[1].q))), table, level);
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

static inline vec_b two_words(uint32_t a, uint32_t b) {
    return vreinterpretq_s8_u32(vsetq_lane_u32(b, vdupq_n_u32(a), 1));
}

static inline vec_d unpack_sq3wo(const splitq_block_sq3wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    uint32_t high[2];
    memcpy(&high[0], x[0].qh, 4);
    memcpy(&high[1], x[1].qh, 4);
    const vec_b state = two_words(x[0].d, x[1].d), high_bits = open_first(two_words(high[0], high[1]), state);
    levels_3wo(vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x[0].q), vld1_u8(x[1].q))), high_bits, states_first(state, 1), table, level);
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

static inline vec_d unpack_sq2wo(const splitq_block_sq2wo * x, int v, vec_w table, vec_b level[4], vec_d d) {
    const vec_b state = states_first(two_words(x[0].d, x[1].d), 0);
    levels_2wo(vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x[0].q), vld1_u8(x[1].q))), state, table, level);
    return d | (vec_d) (x[0].d | x[1].d << 8) << 16*v;
}

#endif

#if defined(LANES)

// Interleaved words of 64 bits, see interleave_rows: w[i] has levels 8*i .. 8*i + 7 of rows 0, 1, 4, 5, 8 .., and w[4 + i] of
// rows 2, 3, 6, 7, 10 ...
static inline void panel_sq6w(const uint8_t * x, vec_w table, vec_b w[8]) {
    for (int i = 0; i < 2; ++i) {
        const vec_b qh = load_b(x + 4*LANES*(4 + i));
        levels_6w(load_b(x + 4*LANES*i),       qh,           table, w + 4*i);
        levels_6w(load_b(x + 4*LANES*(2 + i)), later(qh, 4), table, w + 4*i + 2);
    }
}

static inline void panel_sq5w(const uint8_t * x, vec_w table, vec_b w[8]) {
    const vec_b qh = load_b(x + 16*LANES);
    for (int i = 0; i < 2; ++i) {
        const vec_b high = i ? high_second(qh) : high_first(qh);
        levels_5w(load_b(x + 4*LANES*i),       high,           table, w + 4*i);
        levels_5w(load_b(x + 4*LANES*(2 + i)), later(high, 2), table, w + 4*i + 2);
    }
}

static inline void panel_sq4w(const uint8_t * x, vec_w table, vec_b w[8]) {
    for (int i = 0; i < 4; ++i) { levels_4w(load_b(x + 4*LANES*i), table, w + i/2*2 + i%2*4); }
}

static inline void panel_sq3w(const uint8_t * x, vec_w table, vec_b w[8]) {
    const vec_b qh = load_b(x + 8*LANES);
    levels_3w(load_b(x),           high_first(qh),  table, w);
    levels_3w(load_b(x + 4*LANES), high_second(qh), table, w + 4);
}

static inline void panel_sq2w(const uint8_t * x, vec_w table, vec_b w[8]) {
    for (int i = 0; i < 2; ++i) { levels_2w(load_b(x + 4*LANES*i), table, w + 4*i); }
}

static inline void panel_sq3wo(const uint8_t * x, vec_w table, vec_b w[8]) {
    const vec_b qh = load_b(x + 8*LANES), d = load_states(x + 12*LANES);
    levels_3wo(load_b(x),           open_first(qh, d),  states_first(d, 1),  table, w);
    levels_3wo(load_b(x + 4*LANES), open_second(qh, d), states_second(d, 1), table, w + 4);
}

static inline void panel_sq2wo(const uint8_t * x, vec_w table, vec_b w[8]) {
    const vec_b d = load_states(x + 8*LANES);
    levels_2wo(load_b(x),           states_first(d, 0),  table, w);
    levels_2wo(load_b(x + 4*LANES), states_second(d, 0), table, w + 4);
}

static inline vec_i dot_token_w(vec_i sum, const vec_b w[8], const int8_t * y) {
    vec_i part[2] = { zero_i(), zero_i() };
    for (int i = 0; i < 4; ++i) {
        const vec_b eight = set_8(y + 8*i);
        part[0] = dot(part[0], w[i],     eight);
        part[1] = dot(part[1], w[4 + i], eight);
    }
    return add_i(sum, reduce_2(part));
}

static inline void arrange_w(vec_b w[8]) {
    vec_b to[8];
    for (int i = 0; i < 4; ++i) {
#if defined(SPLITQ_PAIRS_TOKENS) // takes them as they are
        to[2*i] = w[i];
        to[2*i + 1] = w[4 + i];
#else
        to[2*i] = evens(w[i], w[4 + i]);
        to[2*i + 1] = odds(w[i], w[4 + i]);
#endif
    }
    memcpy(w, to, sizeof(to));
}

#endif

#if defined(LANES) && !defined(SPLITQ_PAIRS_TOKENS)

static inline void pair(int8_t * y0, int8_t * y1) {
    GGML_UNUSED(y0), GGML_UNUSED(y1);
}

static inline void arrange(vec_b w[8]) {
    GGML_UNUSED(w);
}

static inline void dot_pair(vec_i sum[2], const vec_b w[8], const int8_t * y0, const int8_t * y1) {
    sum[0] = dot_token(sum[0], w, y0);
    sum[1] = dot_token(sum[1], w, y1);
}

#endif
