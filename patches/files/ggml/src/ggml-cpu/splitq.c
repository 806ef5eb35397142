// SPDX-License-Identifier: MIT
#include "splitq.h"

#include "splitq-ints.h"

#include <assert.h>

// Four blocks to a turn: the loop's own instructions count beside some fifteen a block.
#if defined(__GNUC__)
#define SPLITQ_UNROLL _Pragma("GCC unroll 2")
#else
#define SPLITQ_UNROLL
#endif

#define SPLITQ_PAIRS(name)                                                                                            \
    sums even = no_sums(), odd = no_sums();                                                                           \
    SPLITQ_UNROLL                                                                                                     \
    for (; ib < (nb & ~1); ib += 2) {                                                                                 \
        even = add_scaled(even, SPLITQ_D(ib),     dot_signed(levels_##name(x + ib),     load_q8(y + ib)));            \
        odd  = add_scaled(odd,  SPLITQ_D(ib + 1), dot_signed(levels_##name(x + ib + 1), load_q8(y + ib + 1)));        \
    }

#define SPLITQ_D(ib) scaled_half(splitq_scale[x[ib].d], y[ib].d)

#define SPLITQ_VEC_DOT(name)                                                                                          \
    void splitq_vec_dot_##name##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) { \
        assert(n % SPLITQ_QK == 0 && nrc == 1);                                                                       \
        GGML_UNUSED(bs), GGML_UNUSED(bx), GGML_UNUSED(by), GGML_UNUSED(nrc);                                          \
        const splitq_block_##name * x = vx;                                                                           \
        const block_q8_0          * y = vy;                                                                           \
        const int nb = n/SPLITQ_QK;                                                                                   \
        int ib = 0;                                                                                                   \
        SPLITQ_PAIRS(name)                                                                                            \
        if (ib < nb) {                                                                                                \
            even = add_scaled(even, SPLITQ_D(ib), dot_signed(levels_##name(x + ib), load_q8(y + ib)));                \
        }                                                                                                             \
        *s = total(even, odd);                                                                                        \
    }

SPLITQ_VEC_DOT(sq4)
SPLITQ_VEC_DOT(sq3)
SPLITQ_VEC_DOT(sq2)
SPLITQ_VEC_DOT(sq6w)
SPLITQ_VEC_DOT(sq5w)
SPLITQ_VEC_DOT(sq4w)
SPLITQ_VEC_DOT(sq3w)
SPLITQ_VEC_DOT(sq2w)

// sq4x: for each range, scale times the sum of code * y and min times the sum of y, in that order.
void splitq_vec_dot_sq4x_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(n % SPLITQ_QK_SQ4X == 0 && nrc == 1);
    GGML_UNUSED(bs), GGML_UNUSED(bx), GGML_UNUSED(by), GGML_UNUSED(nrc);
    const splitq_block_sq4x * x = vx;
    const block_q8_0        * y = vy;

    sums acc[2] = { no_sums(), no_sums() };
    for (int i = 0; i < n/SPLITQ_QK_SQ4X; ++i, ++x) {
        for (int ib = 0; ib < SPLITQ_QK_SQ4X/32; ++ib, ++y) {
            const ints  codes = load_4bit(x->sub[ib].qs);
            const ints  range = load_2bit(x->sub[ib].range);
            const ints  q8    = load_q8(y);
            for (int r = 0; r < 3; ++r) {
                const ints inside = equal(range, r);
                acc[ib%2] = add_scaled(acc[ib%2], scaled_half(to_float(x->scale[r]), y->d), dot_unsigned(product(codes, inside), q8));
                acc[ib%2] = add_scaled(acc[ib%2], scaled_half(to_float(x->min[r]), y->d), dot_unsigned(inside, q8));
            }
        }
    }
    *s = total(acc[0], acc[1]);
}
