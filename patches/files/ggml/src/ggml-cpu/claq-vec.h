// What the kernels of cq4, cq3 and cq2 need beside splitq-vec.h, for the same instruction sets. A vector w has, of LANES
// interleaved rows, 4 neighbouring columns; bits and wide are constants where these are inlined.
//
//   load_half    LANES halves as floats
//   shift_by      32-bit words, to the right by n, n < 0: to the left
//   choose       bits of a where mask has them, else of b
//   place        (bits of a in mask) | b
//   look_up_n    levels of column k at n*k for byte k; index: n*k + code (AVX2, n = 16: the code)
#pragma once

#include "splitq-vec.h"

#if LANES == 16

static inline vec_f load_half(const ggml_half * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vec_b set_b(int32_t v)               { return _mm512_set1_epi32(v); }
static inline vec_b shift_by(vec_b a, const int n)  { return n < 0 ? _mm512_slli_epi32(a, -n) : _mm512_srli_epi32(a, n); }
static inline vec_b choose(vec_b mask, vec_b a, vec_b b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xe2); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b)  { return _mm512_ternarylogic_epi32(a, mask, b, 0xea); }

// 64 levels: those of 16, 8 or 4 columns.
static inline vec_b look_up_64(const int8_t * levels, vec_b index) {
    return _mm512_permutexvar_epi8(index, _mm512_xor_si512(load_b(levels), _mm512_set1_epi8((char) BIAS)));
}

static inline vec_b look_up_4(const int8_t * levels, int i, vec_b mask, vec_b code) {
    return look_up_64(levels + i/4*64, place(mask, code, set_b(0x0c080400 + i % 4*0x10101010)));
}

static inline vec_b look_up_8(const int8_t * levels, int i, vec_b mask, vec_b code) {
    return look_up_64(levels + i/2*64, place(mask, code, set_b(0x18100800 + i % 2*0x20202020)));
}

static inline vec_b look_up_16(const int8_t * levels, int i, vec_b mask, vec_b code) {
    return look_up_64(levels + i*64, place(mask, code, set_b(0x30201000)));
}

#elif LANES == 8

static inline vec_f load_half(const ggml_half * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline vec_b set_b(int32_t v)               { return _mm256_set1_epi32(v); }
static inline vec_b shift_by(vec_b a, const int n)  { return n < 0 ? _mm256_slli_epi32(a, -n) : _mm256_srli_epi32(a, n); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b) { return _mm256_or_si256(_mm256_and_si256(mask, a), b); }

static inline vec_b choose(vec_b mask, vec_b a, vec_b b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

static inline vec_b levels_16(const int8_t * levels) {
    const vec_b table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels));
    return BIAS ? _mm256_xor_si256(table, _mm256_set1_epi8((char) BIAS)) : table;
}

static inline vec_b look_up_4(const int8_t * levels, int i, vec_b mask, vec_b code) {
    return _mm256_shuffle_epi8(levels_16(levels + 16*i), place(mask, code, set_b(0x0c080400)));
}

static inline vec_b look_up_8(const int8_t * levels, int i, vec_b mask, vec_b code) {
    const vec_b index = place(mask, code, set_b(0x08000800));
    const vec_b first = _mm256_shuffle_epi8(levels_16(levels + 32*i), index);
    return _mm256_blend_epi16(first, _mm256_shuffle_epi8(levels_16(levels + 32*i + 16), index), 0xaa);
}

static inline vec_b look_up_16(const int8_t * levels, int i, vec_b mask, vec_b code) {
    const vec_b index = _mm256_and_si256(mask, code);
    vec_b of[4];
    for (int k = 0; k < 4; ++k) { of[k] = levels_16(levels + 64*i + 16*k); }
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
static inline vec_b set_b(int32_t v)               { return vreinterpretq_s8_s32(vdupq_n_s32(v)); }
static inline vec_b choose(vec_b mask, vec_b a, vec_b b) { return vbslq_s8(vreinterpretq_u8_s8(mask), a, b); }
static inline vec_b place(vec_b mask, vec_b a, vec_b b)  { return vorrq_s8(vandq_s8(mask, a), b); }

static inline vec_b shift_by(vec_b a, const int n) {
    return vreinterpretq_s8_u32(vshlq_u32(vreinterpretq_u32_s8(a), vdupq_n_s32(-n)));
}

static inline vec_b look_up_4(const int8_t * levels, int i, vec_b mask, vec_b code) {
    return vqtbl1q_s8(vld1q_s8(levels + 16*i), vreinterpretq_u8_s8(place(mask, code, set_b(0x0c080400))));
}

static inline vec_b look_up_8(const int8_t * levels, int i, vec_b mask, vec_b code) {
    const int8x16x2_t table = {{ vld1q_s8(levels + 32*i), vld1q_s8(levels + 32*i + 16) }};
    return vqtbl2q_s8(table, vreinterpretq_u8_s8(place(mask, code, set_b(0x18100800))));
}

static inline vec_b look_up_16(const int8_t * levels, int i, vec_b mask, vec_b code) {
    int8x16x4_t table;
    for (int k = 0; k < 4; ++k) { table.val[k] = vld1q_s8(levels + 64*i + 16*k); }
    return vqtbl4q_s8(table, vreinterpretq_u8_s8(place(mask, code, set_b(0x30201000))));
}

#endif

// Of a block, x: its words for LANES rows, 4*LANES bytes each; extra: the same of a wide block's upper bits, at 64 bytes.
static inline void unpack_claq(const int bits, const bool wide, const uint8_t * x, const int8_t * levels, const uint8_t * extra, vec_b w[8]) {
    const vec_b low = set_b(0x03030303), third = set_b(0x04040404), fourth = set_b(0x08080808);
    for (int j = 0; j < 8; ++j) {
        if (bits == 4) {
            w[j] = look_up_16(levels, j, set_b(0x0f0f0f0f), shift_by(load_b(x + j/2*4*LANES), j % 2*4));
            continue;
        }
        vec_b code = shift_by(load_b(x + j/4*4*LANES), j % 4*2);
        if (bits == 2 && wide) {
            code = choose(low, code, shift_by(load_b(extra + j/4*64), j % 4*2 - 2));
        }
        if (bits == 3) {
            code = choose(third, shift_by(load_b(x + 8*LANES), j - 2), code);
        }
        if (bits == 3 && wide) {
            code = choose(fourth, shift_by(load_b(extra), j - 3), code);
        }
        w[j] = wide      ? look_up_16(levels, j, set_b(0x0f0f0f0f), code) :
               bits == 3 ? look_up_8 (levels, j, set_b(0x07070707), code) : look_up_4(levels, j, low, code);
    }
}
