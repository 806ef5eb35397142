// SPDX-License-Identifier: MIT
#include "columns-mul.h"

#include "ggml-impl.h"
#include "splitq-vec.h"

#if defined(LANES)

#include "columns-vec.h"

// Panels with codebooks that are multiplied with one token at once: they share its activations and the levels, if there are
// registers.
#if defined(SPLITQ_AVX512)
#define PANELS 4
#else
#define PANELS 1
#endif

#if defined(__GNUC__)
#define COLUMNS_PREFETCH(at, bytes) for (size_t i = 0; i < (bytes); i += 64) { __builtin_prefetch((at) + i, 0, 2); }
#else
#define COLUMNS_PREFETCH(at, bytes)
#endif

// One block of a token.
struct token_block {
    int8_t  q[COLUMNS_QK];
    int32_t bias;
    float   d;
};

// Packed tokens: the blocks of one token after the other's, then for outliers the floats, column by column of TOKENS
// tokens, or of those that are left.
size_t columns_token_size(int64_t columns) {
    return columns/COLUMNS_QK*sizeof(struct token_block) + columns*sizeof(float);
}

static const struct token_block * blocks_of(const struct columns_side * side, const char * packed, int64_t t) {
    return (const struct token_block *) packed + side->columns/COLUMNS_QK*t;
}

// Of token t, the next column `*width` further.
static float * plain_of(const struct columns_side * side, const char * packed, int64_t t, int64_t count, int64_t * width) {
    const int64_t group = t/TOKENS*TOKENS;
    *width = MIN(TOKENS, count - group);
    return (float *) (uintptr_t) blocks_of(side, packed, count) + side->columns*group + t - group;
}

float columns_quantize(const float * x, int8_t * q, int32_t * sum) {
    int32_t bits[COLUMNS_QK], most = 0;
    memcpy(bits, x, sizeof(bits));
    for (int j = 0; j < COLUMNS_QK; ++j) {
        const int32_t magnitude = bits[j] & 0x7fffffff;
        most = MAX(most, magnitude);
    }
    float max;
    memcpy(&max, &most, sizeof(max));
    const float inverse = max > 0 ? 127/max : 0;
    *sum = 0;
    for (int j = 0; j < COLUMNS_QK; ++j) {
        const float rounded = x[j]*inverse + 0x1.8p23f; // the integer is in its lowest bits
        memcpy(&bits[j], &rounded, sizeof(rounded));
        q[j] = (int8_t) bits[j];
        *sum += (int8_t) bits[j];
    }
    return max/127;
}

void columns_pack(const struct columns_side * side, const float * x, int first, int last, int64_t t, int64_t count, char * packed) {
    struct token_block * y = (struct token_block *) (uintptr_t) blocks_of(side, packed, t);
    int64_t width;
    float * plain = plain_of(side, packed, t, count, &width);
    for (int b = first; b < last; ++b) {
        float v[COLUMNS_QK];
        for (int j = 0; j < COLUMNS_QK; ++j) { v[j] = x[side->order ? side->order[COLUMNS_QK*b + j] : COLUMNS_QK*b + j]; }
        for (int j = 0; side->outliers && j < COLUMNS_QK; ++j) { plain[width*(COLUMNS_QK*b + j)] = v[j]; }
        for (int j = 0; j < COLUMNS_QK; j += LANES) { store_f(v + j, mul_f(load_f(v + j), load_half(side->scale + COLUMNS_QK*b + j))); }
        y[b].d = columns_quantize(v, y[b].q, &y[b].bias);
        y[b].bias *= -BIAS;
        if (t % 2) { pair(y[b - (int) side->columns/COLUMNS_QK].q, y[b].q); }
    }
}

// The sum and a block's products, scaled by the activations' d and, without codebooks, the weights'.
SPLITQ_ALWAYS_INLINE vec_f add_dots(const bool codebooks, vec_i dots, float y_d, vec_f d, vec_f sum) {
    return codebooks ? fma_f(to_f(dots), set_f(y_d), sum) : fma_f(mul_f(to_f(dots), set_f(y_d)), d, sum);
}

// Block b of LANES rows from `row` on, whose words are at x; more: by how many bits its codes are longer.
SPLITQ_ALWAYS_INLINE void unpack_block(const int bits, const int more, const bool codebooks, const struct columns_side * side, const uint8_t * x, size_t row, size_t b,
                                 vec_t table, const int8_t * levels, vec_b w[8]) {
    const uint8_t * extra = more ? columns_extra(side, more, row, b) : NULL;
    SPLITQ_UNROLL_16
    for (int j = 0; j < 8; ++j) { w[j] = codebooks ? unpack_own(bits, more, x, extra, j, levels) : unpack_fixed(bits, more, x, extra, j, table); }
}

static inline vec_t table_of(int bits) {
    static const int8_t * const fixed[] = { table_sq2, table_sq3, table_sq4 };
    return load_tables(fixed[bits - 2], 1 << bits);
}

// Blocks [first, last) of `panels` times LANES rows, with n tokens, 1 or even. more: by how many bits all their codes are longer.
SPLITQ_ALWAYS_INLINE void mul_columns_blocks(const int bits, const int more, const bool codebooks, const int panels, const int n, const struct columns_side * side,
                                 const uint8_t * x, size_t row, uint32_t first, uint32_t last, const struct token_block * y, vec_f * sum) {
    const vec_t table = table_of(bits + more);
    const size_t nb = side->columns/COLUMNS_QK, size = (4*bits + !codebooks)*LANES;
    for (size_t b = first; b < last; ++b) {
        const int8_t * levels = codebooks ? columns_levels(side, bits, b) : NULL;
        if (panels > 1) { // the processor prefetches one stream: the next panels are brought nearer in that order
            COLUMNS_PREFETCH(x + panels*(nb + b)*size, panels*size)
        }
        if (n == 1 && !codebooks) {
            SPLITQ_PANEL_PREFETCH(x + b*size, size)
        }
        SPLITQ_UNROLL_16
        for (int p = 0; p < panels; ++p) {
            const uint8_t * block = x + (nb*p + b)*size;
            vec_b w[8];
            unpack_block(bits, more, codebooks, side, block, row + LANES*p, b, table, levels, w);
            const vec_f d = codebooks ? zero_f() : scale_f(load_d(block + 4*bits*LANES));
            if (n == 1) {
                sum[p] = add_dots(codebooks, dot_token(set_i(y[b].bias), w, y[b].q), y[b].d, d, sum[p]);
                continue;
            }
            arrange(w);
            SPLITQ_UNROLL_16
            for (int t = 0; t < n; t += 2) {
                const struct token_block * y0 = y + nb*t + b, * y1 = y0 + nb;
                vec_i dots[2] = { set_i(y0->bias), set_i(y1->bias) };
                dot_pair(dots, w, y0->q, y1->q);
                sum[t]     = add_dots(codebooks, dots[0], y0->d, d, sum[t]);
                sum[t + 1] = add_dots(codebooks, dots[1], y1->d, d, sum[t + 1]);
            }
        }
    }
}

// A row's outliers times n tokens.
SPLITQ_ALWAYS_INLINE void add_outliers(const int n, const struct columns_side * side, size_t row, const float * plain, int64_t width, float * const * out, int64_t r) {
    float sum[16] = { 0 };
    for (uint32_t i = side->start[row]; i < side->start[row + 1]; ++i) {
        const float value = to_float(side->value[i]), * x = plain + width*side->column[i];
        for (int t = 0; t < n; ++t) { sum[t] += value*x[t]; }
    }
    for (int t = 0; t < n; ++t) { out[t][r] += sum[t]; }
}

// The same for up to LANES rows and one token: first all products, then the sums, most of which take one step. Loops over a
// few outliers each would end where the processor does not expect it.
static bool add_outliers_of_panel(const struct columns_side * side, size_t row, int64_t rows, const float * plain, int64_t width, float * out) {
    enum { most = 1024 };
    const uint32_t * start = side->start + row;
    const uint32_t first = start[0]/LANES*LANES, count = start[rows] - first;
    if (count > most) {
        return false;
    }
    float product[most + 2*LANES];
    for (uint32_t i = start[0] - first; i < count; ++i) { product[i] = plain[width*side->column[first + i]]; }
    for (uint32_t i = 0; i < count; i += LANES) { store_f(product + i, mul_f(load_f(product + i), load_half(side->value + first + i))); }
    for (int64_t r = 0; r < rows; ++r) {
        vec_f sum = zero_f();
        for (uint32_t i = start[r]; i < start[r + 1]; i += LANES) { sum = add_first(load_f(product + i - first), start[r + 1] - i, sum); }
        out[r] += sum_f(sum);
    }
    return true;
}

SPLITQ_ALWAYS_INLINE void mul_columns_rows(const int bits, const bool codebooks, const int n, const struct columns_side * side, const uint8_t * x, size_t row, int64_t rows,
                               const char * packed, int64_t t, int64_t count, float * const * out) {
    const struct token_block * y = blocks_of(side, packed, t);
    int64_t width;
    const float * plain = plain_of(side, packed, t, count, &width);
    const uint32_t nb = side->columns/COLUMNS_QK;
    const size_t panel = (size_t) nb*(4*bits + !codebooks)*LANES;
    const int most = n == 1 && codebooks ? PANELS : 1, more = columns_more_bits(bits, codebooks);
    for (int64_t r = 0, panels; r < rows; r += panels*LANES, x += panels*panel) {
        vec_f sum[16];
        panels = rows - r > (most - 1)*LANES ? most : 1;
        for (int i = 0; i < most*n; ++i) { sum[i] = zero_f(); }
        if (panels == most) {
            if (bits != 4) {
                mul_columns_blocks(bits, more, codebooks, most, n, side, x, row + r, 0, side->wide, y, sum);
            }
            mul_columns_blocks(bits, 0, codebooks, most, n, side, x, row + r, side->wide, nb, y, sum);
        } else {
            if (bits != 4) {
                mul_columns_blocks(bits, more, codebooks, 1, n, side, x, row + r, 0, side->wide, y, sum);
            }
            mul_columns_blocks(bits, 0, codebooks, 1, n, side, x, row + r, side->wide, nb, y, sum);
        }
        for (int p = 0; p < panels; ++p) {
            const int64_t at = r + LANES*p;
            for (int i = 0; i < n; ++i) {
                const vec_f scale = codebooks ? load_half(side->row + row + at) : set_f(0x1p-4f); // see scale_f
                const vec_f result = mul_f(sum[n == 1 ? p : i], scale);
                if (rows - at >= LANES) {
                    store_f(out[i] + at, result);
                } else {
                    float some[LANES];
                    store_f(some, result);
                    memcpy(out[i] + at, some, sizeof(float)*(rows - at));
                }
            }
        }
        for (int64_t i = r; codebooks && side->outliers && i < MIN(rows, r + panels*LANES); i += LANES) {
            const int64_t end = MIN(rows, i + LANES);
            if (n == 1 && add_outliers_of_panel(side, row + i, end - i, plain, width, out[0] + i)) {
                continue;
            }
            for (int64_t k = i; k < end; ++k) { add_outliers(n, side, row + k, plain, width, out, k); }
        }
    }
}

// Blocks [first, last) of LANES rows, for tiles.
SPLITQ_ALWAYS_INLINE void decode_blocks(const int bits, const int more, const bool codebooks, const struct columns_side * side, const uint8_t * x, size_t row,
                                  uint32_t first, uint32_t last, tile * to) {
    const vec_t table = table_of(bits + more);
    const size_t size = (4*bits + !codebooks)*LANES;
    for (size_t b = first; b < last; ++b) {
        const uint8_t * block = x + b*size;
        vec_b w[8];
        unpack_block(bits, more, codebooks, side, block, row, b, table, codebooks ? columns_levels(side, bits, b) : NULL, w);
        arrange(w);
        const vec_f d = codebooks ? load_half(side->row + row) : mul_f(scale_f(load_d(block + 4*bits*LANES)), set_f(0x1p-4f));
        tile_rows(w, d, side->scale + COLUMNS_QK*b, to + b);
    }
}

SPLITQ_ALWAYS_INLINE void decode_rows(const int bits, const bool codebooks, const struct columns_side * side, const uint8_t * x, size_t row, int64_t rows, tile * to) {
    if (bits != 4) {
        decode_blocks(bits, columns_more_bits(bits, codebooks), codebooks, side, x, row, 0, side->wide, to);
    }
    decode_blocks(bits, 0, codebooks, side, x, row, side->wide, side->columns/COLUMNS_QK, to);
    for (int64_t r = 0; side->outliers && r < rows; ++r) {
        for (uint32_t i = side->start[row + r]; i < side->start[row + r + 1]; ++i) {
            const uint32_t c = side->column[i] % COLUMNS_QK;
            uint16_t * at = &to[side->column[i]/COLUMNS_QK].bf16[c/2][2*r + c % 2];
            *at = ggml_compute_fp32_to_bf16(ggml_compute_bf16_to_fp32((ggml_bf16_t) { *at }) + to_float(side->value[i])).bits;
        }
    }
}

void columns_decode(enum ggml_type type, const struct columns_side * side, const uint8_t * x, int64_t row, int64_t rows, tile * to) {
    switch (type) {
        case GGML_TYPE_SPLITQ_CQ4:  decode_rows(4, true,  side, x, row, rows, to); break;
        case GGML_TYPE_SPLITQ_CQ3:  decode_rows(3, true,  side, x, row, rows, to); break;
        case GGML_TYPE_SPLITQ_CQ2:  decode_rows(2, true,  side, x, row, rows, to); break;
        case GGML_TYPE_SPLITQ_SQ3C: decode_rows(3, false, side, x, row, rows, to); break;
        case GGML_TYPE_SPLITQ_SQ2C: decode_rows(2, false, side, x, row, rows, to); break;
        default: GGML_ABORT("type without a side tensor");
    }
}

#define COLUMNS_ARGS side, x, row, rows, packed, t, count, out
#define COLUMNS_MUL(name, bits, codebooks)                                                                            \
    static int mul_##name(const struct columns_side * side, const uint8_t * x, size_t row, int64_t rows,              \
                          const char * packed, int64_t t, int64_t count, float * const * out) {                    \
        if (TOKENS >= 16 && count - t >= 16) { mul_columns_rows(bits, codebooks, 16, COLUMNS_ARGS); return 16; }         \
        if (TOKENS >=  8 && count - t >=  8) { mul_columns_rows(bits, codebooks,  8, COLUMNS_ARGS); return  8; }         \
        if (count - t >= 4)                  { mul_columns_rows(bits, codebooks,  4, COLUMNS_ARGS); return  4; }         \
        if (count - t >= 2)                  { mul_columns_rows(bits, codebooks,  2, COLUMNS_ARGS); return  2; }         \
        mul_columns_rows(bits, codebooks, 1, COLUMNS_ARGS);                                                              \
        return 1;                                                                                                  \
    }

COLUMNS_MUL(cq4,  4, true)
COLUMNS_MUL(cq3,  3, true)
COLUMNS_MUL(cq2,  2, true)
COLUMNS_MUL(sq3c, 3, false)
COLUMNS_MUL(sq2c, 2, false)

int columns_mul(enum ggml_type type, const struct columns_side * side, const uint8_t * x, int64_t row, int64_t rows,
             const char * packed, int64_t t, int64_t count, float * const * out) {
    switch (type) {
        case GGML_TYPE_SPLITQ_CQ4:  return mul_cq4(COLUMNS_ARGS);
        case GGML_TYPE_SPLITQ_CQ3:  return mul_cq3(COLUMNS_ARGS);
        case GGML_TYPE_SPLITQ_CQ2:  return mul_cq2(COLUMNS_ARGS);
        case GGML_TYPE_SPLITQ_SQ3C: return mul_sq3c(COLUMNS_ARGS);
        case GGML_TYPE_SPLITQ_SQ2C: return mul_sq2c(COLUMNS_ARGS);
        default: GGML_ABORT("type without a side tensor");
    }
}

#endif
