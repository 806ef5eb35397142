// SPDX-License-Identifier: MIT
// What the kernels of ggml-columns.h's types need beside splitq-vec.h, for the same instruction sets. A vector has, of LANES
// interleaved rows, 4 neighbouring columns 4*j + k. Codes have bits + more bits; these and j are constants where these
// functions are inlined.
//
//   load_half    LANES halves as floats
//   add_first    the first n floats of a, and b
//   shift_by     32-bit words, to the right by n, n < 0: to the left
//   place        bits of a where mask has them, and b, which has none there
//   look_up_own  levels of codebooks of n levels, the first that of a block's first column; index: codes, and beside(n, j)
//   unpack_fixed levels of sq4, sq3 or sq2; table: load_tables for n = bits + more bits
#pragma once

#include "splitq-vec.h"

#if LANES == 16

static inline vec_f load_half(const ggml_half * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vec_f add_first(vec_f a, uint32_t n, vec_f b) { return _mm512_mask_add_ps(b, (__mmask16) (n < 16 ? (1u << n) - 1 : 0xffff), a, b); }
static inline vec_b set_b(int32_t v)               { return _mm512_set1_epi32(v); }
static inline vec_b shift_by(vec_b a, const int n)  { return n < 0 ? _mm512_slli_epi32(a, -n) : _mm512_srli_epi32(a, n); }
static inline vec_b choose(vec_b mask, vec_b a, vec_b b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xe2); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b)  { return _mm512_ternarylogic_epi32(a, mask, b, 0xea); }

// 64 levels are those of 16, 8 or 4 columns.
static inline vec_b beside(const int n, int j) { return set_b(n*0x03020100 + j % (16/n)*n*0x04040404); }

static inline vec_b look_up_own(const int n, const int8_t * levels, int j, vec_b index) {
    const vec_b table = load_b(levels + j/(16/n)*64);
    return _mm512_permutexvar_epi8(index, _mm512_xor_si512(table, _mm512_set1_epi8((char) BIAS)));
}

// As panel_sq2 and panel_sq3: the tables have the levels where code i of a byte finds them, its third bit beside it.
static inline vec_b unpack_fixed(const int bits, const int more, const uint8_t * x, const uint8_t * extra, const int j, vec_t table) {
    static const int third[4] = { 2, 4, 3, 3 };
    const int i = j % 4, all = bits + more;
    vec_b q = load_b(x + j/4*4*LANES);
    if (all == 4) {
        q = choose(set_b(0x04040404), shift_by(load_b(x + 8*LANES), j - 2), shift_by(q, 2*i));
        return _mm512_permutexvar_epi8(choose(set_b(0x08080808), shift_by(load_b(extra), j - 3), q), table.places[0]);
    }
    q = i == 3 ? shift_by(q, 2) : q;
    if (all == 3) {
        q = choose(set_b(0x01010101 << third[i]), shift_by(load_b(more ? extra : x + 8*LANES), j - third[i]), q);
    }
    return _mm512_permutexvar_epi8(q, table.places[i < 3 ? i : 2]);
}

#elif LANES == 8

static inline vec_f load_half(const ggml_half * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline vec_f add_first(vec_f a, uint32_t n, vec_f b) {
    const __m256i counted = _mm256_cmpgt_epi32(set_i((int32_t) n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_add_ps(b, _mm256_and_ps(a, _mm256_castsi256_ps(counted)));
}

static inline vec_b set_b(int32_t v)               { return _mm256_set1_epi32(v); }
static inline vec_b shift_by(vec_b a, const int n)  { return n < 0 ? _mm256_slli_epi32(a, -n) : _mm256_srli_epi32(a, n); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b) { return _mm256_or_si256(_mm256_and_si256(mask, a), b); }

static inline vec_b levels_16(const int8_t * levels) {
    const vec_b table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels));
    return BIAS ? _mm256_xor_si256(table, _mm256_set1_epi8((char) BIAS)) : table;
}

static inline vec_b beside(const int n, int j) {
    GGML_UNUSED(j);
    return set_b(n*0x03020100 & 0x0f0f0f0f);
}

static inline vec_b look_up_own(const int n, const int8_t * levels, int j, vec_b index) {
    vec_b of[4]; // n/4 of them
    for (int k = 0; k < n/4; ++k) { of[k] = levels_16(levels + 4*n*j + 16*k); }
    if (n == 4) {
        return _mm256_shuffle_epi8(of[0], index);
    }
    if (n == 8) {
        return _mm256_blend_epi16(_mm256_shuffle_epi8(of[0], index), _mm256_shuffle_epi8(of[1], index), 0xaa);
    }
#if defined(SPLITQ_AVX512)
    vec_b w = _mm256_shuffle_epi8(of[0], index);
    w = _mm256_mask_shuffle_epi8(w, 0x22222222, of[1], index);
    w = _mm256_mask_shuffle_epi8(w, 0x44444444, of[2], index);
    return _mm256_mask_shuffle_epi8(w, 0x88888888, of[3], index);
#else
    const vec_b odd = _mm256_set1_epi16((short) 0xff00);
    const vec_b low  = _mm256_blendv_epi8(_mm256_shuffle_epi8(of[0], index), _mm256_shuffle_epi8(of[1], index), odd);
    const vec_b high = _mm256_blendv_epi8(_mm256_shuffle_epi8(of[2], index), _mm256_shuffle_epi8(of[3], index), odd);
    return _mm256_blend_epi16(low, high, 0xaa);
#endif
}

#else // NEON

static inline vec_f load_half(const ggml_half * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vec_f add_first(vec_f a, uint32_t n, vec_f b) {
    static const uint32_t lane[4] = { 0, 1, 2, 3 };
    const uint32x4_t counted = vcgtq_u32(vdupq_n_u32(n), vld1q_u32(lane));
    return vaddq_f32(b, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), counted)));
}

static inline vec_b set_b(int32_t v)               { return vreinterpretq_s8_s32(vdupq_n_s32(v)); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b) { return vbslq_s8(vreinterpretq_u8_s8(mask), a, b); }

static inline vec_b shift_by(vec_b a, const int n) {
    const uint32x4_t words = vreinterpretq_u32_s8(a);
    return vreinterpretq_s8_u32(n < 0 ? words << -n : words >> n);
}

static inline vec_b beside(const int n, int j) {
    GGML_UNUSED(j);
    return set_b(n*0x03020100);
}

static inline vec_b look_up_own(const int n, const int8_t * levels, int j, vec_b index) {
    const uint8x16_t at = vreinterpretq_u8_s8(index);
    levels += 4*n*j;
    if (n == 4) {
        return vqtbl1q_s8(vld1q_s8(levels), at);
    }
    if (n == 8) {
        const int8x16x2_t table = {{ vld1q_s8(levels), vld1q_s8(levels + 16) }};
        return vqtbl2q_s8(table, at);
    }
    const int8x16x4_t table = {{ vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48) }};
    return vqtbl4q_s8(table, at);
}

#endif

// Codes of columns 4*j .. 4*j + 3 of a block of LANES rows, of which x has the words, 4*LANES bytes each, and extra the same
// of the upper bits, at 64 bytes; with the bits of `other`, which has none where the codes are.
static inline vec_b codes_of_columns(const int bits, const int more, const uint8_t * x, const uint8_t * extra, const int j, vec_b other) {
    if (bits == 4) {
        return place(set_b(0x0f0f0f0f), shift_by(load_b(x + j/2*4*LANES), j % 2*4), other);
    }
    vec_b code = place(set_b(0x03030303), shift_by(load_b(x + j/4*4*LANES), j % 4*2), other);
    if (bits == 3) { code = place(set_b(0x04040404), shift_by(load_b(x + 8*LANES), j - 2), code); }
    if (more == 1) { code = place(set_b(0x01010101 << bits), shift_by(load_b(extra), j - bits), code); }
    if (more == 2) { code = place(set_b(0x0c0c0c0c), shift_by(load_b(extra + j/4*64), j % 4*2 - 2), code); }
    return code;
}

// The same columns' levels, with codebooks.
static inline vec_b unpack_own(const int bits, const int more, const uint8_t * x, const uint8_t * extra, const int j, const int8_t * levels) {
    const int n = 1 << (bits + more);
    return look_up_own(n, levels, j, codes_of_columns(bits, more, x, extra, j, beside(n, j)));
}

#if LANES < 16
// The same, with the levels of sq4, sq3 or sq2.
static inline vec_b unpack_fixed(const int bits, const int more, const uint8_t * x, const uint8_t * extra, const int j, vec_t table) {
    const vec_b code = codes_of_columns(bits, more, x, extra, j, set_b(0));
#if LANES == 8
    return _mm256_shuffle_epi8(table, code);
#else
    return vqtbl1q_s8(table, vreinterpretq_u8_s8(code));
#endif
}
#endif
