// SPDX-License-Identifier: MIT
// The kernels as functions of their own, for count.py: one_TYPE and many_TYPE of interleaved rows with one
// token and with as many as a pass takes. Compiled to assembly, never run.
#include "splitq-mul.c"
#include "columns-mul.c"

#define KERNELS(name) \
    void one_##name(const uint8_t * x, int nb, const struct grid * grid, const struct many * y, float * const * out)  { mul_panel_##name(x, nb, grid, y, 1, out); } \
    void many_##name(const uint8_t * x, int nb, const struct grid * grid, const struct many * y, float * const * out) { mul_panel_##name(x, nb, grid, y, TOKENS, out); }

KERNELS(sq4)
KERNELS(sq3)
KERNELS(sq2)
KERNELS(sdr4)
KERNELS(sq4w)
KERNELS(sq3w)
KERNELS(sq2w)
KERNELS(sq3wo)
KERNELS(sq2wo)

#define BLOCKS const struct columns_side * side, const uint8_t * x, size_t row, uint32_t last, const struct token_block * y, vec_f * to
#define COLUMNS(name, bits, more, codebooks) \
    void one_##name(BLOCKS)  { vec_f s[PANELS]; memcpy(s, to, sizeof(s)); mul_columns_blocks(bits, more, codebooks, codebooks ? PANELS : 1, 1, side, x, row, 0, last, y, s); memcpy(to, s, sizeof(s)); } \
    void many_##name(BLOCKS) { vec_f s[TOKENS]; memcpy(s, to, sizeof(s)); mul_columns_blocks(bits, more, codebooks, 1, TOKENS, side, x, row, 0, last, y, s); memcpy(to, s, sizeof(s)); }

COLUMNS(cq4,  4, 0, true)
COLUMNS(cq3,  3, 0, true)
COLUMNS(cq2,  2, 0, true)
COLUMNS(cq3_wide, 3, columns_more_bits(3, true), true)
COLUMNS(cq2_wide, 2, columns_more_bits(2, true), true)
COLUMNS(sq3c, 3, 0, false)
COLUMNS(sq2c, 2, 0, false)
COLUMNS(sq3c_wide, 3, columns_more_bits(3, false), false)
COLUMNS(sq2c_wide, 2, columns_more_bits(2, false), false)
