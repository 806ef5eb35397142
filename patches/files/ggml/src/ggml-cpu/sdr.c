// SPDX-License-Identifier: MIT
#include "sdr.h"

#include "splitq-ints.h"
#include "ggml-sdr.h"

#include <assert.h>

// Read from 0, 4 or 8 these shift nothing, the second group's lanes or the first group's.
static const int32_t shift_table[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0 };

static inline const int32_t * shifts_of(const splitq_block_sdr4 * x) {
    return shift_table + 4*((x->d >= SDR_SHIFT_2ND) + (x->d >= SDR_SHIFT_1ST));
}

// add: further shifts of the first and of the second group's lanes.
static inline lanes shifted(lanes l, const int32_t * shift, uint8_t add0, uint8_t add1) {
#if defined(SPLITQ_AVX2)
    const __m256i add = _mm256_setr_m128i(_mm_set1_epi32(add0), _mm_set1_epi32(add1));
    return _mm256_sllv_epi32(l, _mm256_add_epi32(_mm256_loadu_si256((const __m256i *) shift), add));
#elif defined(SPLITQ_NEON)
    return (lanes) {{
        vshlq_s32(l.half[0], vaddq_s32(vld1q_s32(shift),     vdupq_n_s32(add0))),
        vshlq_s32(l.half[1], vaddq_s32(vld1q_s32(shift + 4), vdupq_n_s32(add1))),
    }};
#else
    for (int i = 0; i < 8; ++i) { l.v[i] *= 1 << (shift[i] + (i < 4 ? add0 : add1)); }
    return l;
#endif
}

static inline ints codes_of(const splitq_block_sdr4 * x) {
    return look_up(load_4bit(x->qs), splitq_levels_sdr4);
}

// Shifting by way of the exponent of what the lanes are multiplied with gives the same bits.
static inline sums add_block(sums acc, const splitq_block_sdr4 * x, const block_q8_0 * y) {
    const lanes l = dot_signed(codes_of(x), load_q8(y));
    const float * unit = sdr_unit[x->d];
#if defined(SPLITQ_AVX2)
    const __m256 units = _mm256_castpd_ps(_mm256_broadcast_sd((const double *) unit));
    const __m256 each  = _mm256_permutevar_ps(units, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    return add_scaled(acc, _mm256_mul_ps(each, scaled_half(1, y->d)), l);
#elif defined(SPLITQ_NEON)
    const float d = to_float(y->d);
    return (sums) {{
        vfmaq_n_f32(acc.half[0], vcvtq_f32_s32(l.half[0]), unit[0]*d),
        vfmaq_n_f32(acc.half[1], vcvtq_f32_s32(l.half[1]), unit[1]*d),
    }};
#else
    for (int i = 0; i < 8; ++i) { acc.v[i] = fmaf(unit[i/4]*to_float(y->d), (float) l.v[i], acc.v[i]); }
    return acc;
#endif
}

void splitq_vec_dot_sdr4_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(n % SDR_QK == 0 && nrc == 1);
    GGML_UNUSED(bs), GGML_UNUSED(bx), GGML_UNUSED(by), GGML_UNUSED(nrc);
    const splitq_block_sdr4 * x = vx;
    const block_q8_0     * y = vy;
    const unsigned nb = (unsigned) n/SDR_QK;
    sums even = no_sums(), odd = no_sums();
    unsigned ib = 0;
    for (; ib < (nb & ~1u); ib += 2) {
        even = add_block(even, x + ib,     y + ib);
        odd  = add_block(odd,  x + ib + 1, y + ib + 1);
    }
    if (ib < nb) {
        even = add_block(even, x + ib, y + ib);
    }
    *s = total(even, odd);
}

#define HALF_ONE 0x3c00
static_assert(offsetof(sdr_block_a4, q) == offsetof(block_q8_0, qs), "load_q8 takes both");

float sdr_razor_activations(const float * x, sdr_block_a4 * y, int n) {
    assert(n % SDR_QK == 0);
    float largest = 0;
    for (int i = 0; i < n; ++i) {
        largest = MAX(largest, fabsf(x[i]));
    }
    const float inv = largest > 1e-30f ? 32767/largest : 0;
    for (int group = 0; group < n/SDR_G; ++group) {
        int base[SDR_G], bits = 0, length = 0;
        for (int i = 0; i < SDR_G; ++i) {
            base[i] = (int) MIN(rintf(fabsf(x[SDR_G*group + i])*inv), 32767.0f);
            bits |= base[i];
        }
        while (bits >> length) {
            ++length;
        }
        const int shift = MAX(length - 3, 0);
        for (int i = 0; i < SDR_G; ++i) {
            const int  magnitude = (int) rintf((float) base[i]/(1 << shift));
            const bool negative  = x[SDR_G*group + i] < 0;
            y[group/2].q[group%2*SDR_G + i] = negative ? -magnitude : MIN(magnitude, 7);
        }
        y[group/2].shift[group%2] = shift;
    }
    return largest/32767;
}

float sdr_vec_dot_sdr4_a4(int n, const void * vx, const sdr_block_a4 * y, float scale) {
    const splitq_block_sdr4 * x = vx;
    sums acc[2] = { no_sums(), no_sums() };
    for (unsigned ib = 0; ib < n/SDR_QK; ++ib) {
        const lanes l = dot_signed(codes_of(x + ib), load_q8((const block_q8_0 *) (y + ib)));
        const lanes shifts_added = shifted(l, shifts_of(x + ib), y[ib].shift[0], y[ib].shift[1]);
        acc[ib%2] = add_scaled(acc[ib%2], scaled_half(sdr_unit[x[ib].d][x[ib].d >= SDR_SHIFT_1ST], HALF_ONE), shifts_added);
    }
    return total(acc[0], acc[1])*scale;
}
