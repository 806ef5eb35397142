// SPDX-License-Identifier: MIT
#include "splitq-mul.h"

#include "quants.h"
#include "splitq-amx.h"
#include "splitq-ints.h"
#include "splitq-vec.h"
#include "columns.h"
#include "columns-mul.h"
#include "vec.h"

// Three kernels:
//
//   row by row   for few tokens and weights as they are in the file: LANES blocks of a row give LANES integer sums, which
//                meet LANES scales in one multiply-add.
//   panels       for everything else: LANES interleaved rows, a row in each lane. Tensors in the buffer type of
//                splitq-hook.cpp are stored so; of others, rows are interleaved into the work buffer when many tokens share
//                the effort.
//   tiles        for many tokens, where the processor has them: a panel's blocks are decoded once for all tokens, see
//                splitq-amx.h.
//
// Activations are rounded once, to q8_0 or, for tiles, to bfloat16. All kernels add in an order that depends on the length of
// a row alone.

#if defined(LANES)

#define SPLITQ_FEW 3 // tokens up to which rows are multiplied as stored

// LANES blocks of one row of activations, for few tokens. Vector v of weights holds blocks UNITS*(LANES/4*v + c) .. + UNITS - 1
// in its 128-bit part c, so q has for each vector its 2*UNITS pieces of 16/UNITS weights of each block, and the sums of
// block UNITS*(LANES/4*v + c) + i arrive in lane 4*c + UNITS*v + i, in which order bias and d are. A piece of 16 weights is
// 16*p .. 16*p + 15; of words of 8 bytes it is 8*p .. 8*p + 7 and 16 further.
struct few {
    int8_t  q[32*LANES];
    int32_t bias[LANES];
    float   d[LANES];
};

// One block of activations, for panels.
struct many {
    int8_t  q[32];
    int32_t bias;
    float   d;
};

// A block of activations as q8_0; times the scales of columns, if there are any.
static float quantize(const float * x, const ggml_half * scale, int8_t * q) {
    if (scale) {
        float scaled[32];
        int32_t sum;
        for (int j = 0; j < 32; ++j) { scaled[j] = x[j]*to_float(scale[j]); }
        return columns_quantize(scaled, q, &sum);
    }
    block_q8_0 q8;
    quantize_row_q8_0(x, &q8, 32);
    memcpy(q, q8.qs, 32);
    return to_float(q8.d);
}

// Activations of blocks [LANES*first, LANES*last) of a row of nb blocks; past its end they are zero.
static void pack_few(const float * x, const ggml_half * scale, int nb, int units, int word, int first, int last, struct few * y) {
    const int parts = LANES/4, pieces = 2*units, step = word == 8 ? 8 : 16, further = 24 - step;
    for (int g = first; g < last; ++g) {
        int8_t q8[LANES][32] = { 0 };
        float  d[LANES] = { 0 };
        for (int b = 0, at = 32*LANES*g; b < MIN(nb - LANES*g, LANES); ++b, at += 32) { d[b] = quantize(x + at, scale ? scale + at : NULL, q8[b]); }
        for (int b = 0; b < LANES; ++b) {
            const int v = b/(units*parts), c = b/units%parts, i = b%units;
            int32_t sum = 0;
            for (int p = 0; p < pieces; ++p) {
                int8_t * to = y[g].q + 16*(parts*(pieces*v + p) + c);
                memcpy(to + 8*i, q8[b] + (units == 1 ? step : 8)*p, 8);
                if (units == 1) { memcpy(to + 8, q8[b] + step*p + further, 8); }
            }
            for (int j = 0; j < 32; ++j) { sum += q8[b][j]; }
            y[g].bias[4*c + units*v + i] = -BIAS*sum;
            y[g].d[4*c + units*v + i]    = d[b]*0x1p-4f; // see scale_f
        }
    }
}

static void pack_many(const float * x, const ggml_half * scale, int first, int last, struct many * y) {
    for (int b = first; b < last; ++b) {
        y[b].d = quantize(x + 32*b, scale ? scale + 32*b : NULL, y[b].q)*0x1p-4f; // see scale_f
        int32_t sum = 0;
        for (int j = 0; j < 32; ++j) { sum += y[b].q[j]; }
        y[b].bias = -BIAS*sum;
    }
}

// A panel: for each block its words of 4 bytes, word w of row r at 4*(LANES*w + r), then the scale bytes, if any, of all rows.
// Of types with words of 8 bytes these come first, each in two vectors, see splitq_window_lane. Rows that are not there are
// zero. size: bytes of a block.
SPLITQ_ALWAYS_INLINE void interleave_rows(const char * row, size_t stride, const int rows, int nb, const size_t size, const size_t word, uint8_t * to) {
    for (int b = 0; b < nb; ++b, row += size, to += LANES*size) {
        size_t at = 0;
        for (; word == 8 && at + 8 <= size; at += 8) {
            uint64_t words[LANES] = { 0 };
            SPLITQ_UNROLL_16
            for (int r = 0; r < rows; ++r) { memcpy(&words[splitq_window_lane(r, LANES)], row + stride*r + at, 8); }
            memcpy(to + LANES*at, words, sizeof(words));
        }
        for (; at + 4 <= size; at += 4) {
            uint32_t words[LANES] = { 0 };
            SPLITQ_UNROLL_16
            for (int r = 0; r < rows; ++r) { memcpy(&words[r], row + stride*r + at, 4); }
            memcpy(to + LANES*at, words, sizeof(words));
        }
        for (int r = 0; at < size && r < LANES; ++r) { to[LANES*at + r] = r < rows ? (uint8_t) row[stride*r + at] : 0; }
    }
}

static void interleave(const char * row, size_t stride, int rows, int nb, size_t size, size_t word, uint8_t * to) {
    rows == LANES ? interleave_rows(row, stride, LANES, nb, size, word, to) : interleave_rows(row, stride, rows, nb, size, word, to);
}

// What differs between codes and windows.
#define vec_codes             vec_t
#define vec_windows           vec_w
#define load_table_codes(name)   load_tables(table_##name, sizeof(splitq_levels_##name))
#define load_table_windows(name) load_windows(splitq_windows_##name)
#define dot_token_codes       dot_token
#define dot_token_windows     dot_token_w
#define arrange_codes         arrange
#define arrange_windows       arrange_w

#define scale_sq3wo(d) scale_open(d, 3, grid)
#define scale_sq2wo(d) scale_open(d, 2, grid)

// mul_rows_<type>: rows times one token. A last group that is not whole is read beyond the row's end, which meets
// activations of zero, or from a copy where that would be beyond `end`, the end of the tensor.
// mul_panel_<type>: LANES rows times n tokens, n constant, 1 or even; y: a token's blocks after the other's.
// decode_<type>: LANES rows as nb tiles; scales: of columns, if there are any.
#define SPLITQ_KERNELS(name, units, scale, kind)                                                                      \
    static inline vec_f mul_groups_##name(const splitq_block_##name * x, int groups, vec_##kind table, const struct grid * grid, const struct few * y, vec_f sum) { \
        GGML_UNUSED(grid);                                                                                            \
        for (int g = 0; g < groups; ++g, x += LANES, ++y) {                                                           \
            vec_i part[4/units];                                                                                      \
            vec_d d = zero_d();                                                                                       \
            for (int v = 0; v < 4/units; ++v) {                                                                       \
                vec_b level[2*units];                                                                                 \
                SPLITQ_PREFETCH(x + units*LANES/4*v, 2048, units*LANES/4*sizeof(*x))                                  \
                d = unpack_##name(x + units*LANES/4*v, v, table, level, d);                                           \
                part[v] = zero_i();                                                                                   \
                for (int p = 0; p < 2*units; ++p) {                                                                   \
                    part[v] = dot(part[v], level[p], load_b(y->q + 4*LANES*(2*units*v + p)));                         \
                }                                                                                                     \
            }                                                                                                         \
            const vec_i dots = add_i(reduce_##units(part), load_i(y->bias));                                          \
            sum = fma_f(to_f(dots), mul_f(scale(d), load_f(y->d)), sum);                                              \
        }                                                                                                             \
        return sum;                                                                                                   \
    }                                                                                                                 \
                                                                                                                      \
    static void mul_rows_##name(const char * row, size_t stride, int64_t rows, const char * end, int nb, const struct grid * grid, const struct few * y, float * out) { \
        const int groups = (nb + LANES - 1)/LANES;                                                                    \
        const vec_##kind table = load_table_##kind(name);                                                             \
        for (int64_t r = 0; r < rows; ++r, row += stride) {                                                           \
            const splitq_block_##name * x = (const void *) row;                                                       \
            if ((const char *) (x + LANES*groups) <= end) {                                                           \
                out[r] = sum_f(mul_groups_##name(x, groups, table, grid, y, zero_f()));                               \
            } else {                                                                                                  \
                splitq_block_##name copy[LANES] = { 0 };                                                              \
                memcpy(copy, x + LANES*(groups - 1), sizeof(*x)*(nb - LANES*(groups - 1)));                           \
                const vec_f sum = mul_groups_##name(x, groups - 1, table, grid, y, zero_f());                         \
                out[r] = sum_f(mul_groups_##name(copy, 1, table, grid, y + groups - 1, sum));                         \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    SPLITQ_ALWAYS_INLINE void mul_panel_##name(const uint8_t * x, int nb, const struct grid * grid, const struct many * y, const int n, float * const * out) { \
        GGML_UNUSED(grid);                                                                                            \
        const size_t size = sizeof(splitq_block_##name);                                                              \
        const vec_##kind table = load_table_##kind(name);                                                             \
        vec_f sum[TOKENS];                                                                                            \
        for (int t = 0; t < n; ++t) { sum[t] = zero_f(); }                                                            \
        for (int b = 0; b < nb; ++b, x += LANES*size, ++y) {                                                          \
            vec_b w[8];                                                                                               \
            panel_##name(x, table, w);                                                                                \
            const vec_f d = scale(load_d(x + LANES*(size - 1)));                                                      \
            if (n == 1) {                                                                                             \
                SPLITQ_PANEL_PREFETCH(x, LANES*size)                                                                  \
                sum[0] = fma_f(mul_f(to_f(dot_token_##kind(set_i(y->bias), w, y->q)), set_f(y->d)), d, sum[0]);       \
                continue;                                                                                             \
            }                                                                                                         \
            arrange_##kind(w);                                                                                        \
            SPLITQ_UNROLL_8                                                                                           \
            for (int t = 0; t < n; t += 2) {                                                                          \
                const struct many * y0 = y + (size_t) nb*t, * y1 = y0 + nb;                                           \
                vec_i dots[2] = { set_i(y0->bias), set_i(y1->bias) };                                                 \
                dot_pair(dots, w, y0->q, y1->q);                                                                      \
                sum[t]     = fma_f(mul_f(to_f(dots[0]), set_f(y0->d)), d, sum[t]);                                    \
                sum[t + 1] = fma_f(mul_f(to_f(dots[1]), set_f(y1->d)), d, sum[t + 1]);                                \
            }                                                                                                         \
        }                                                                                                             \
        for (int t = 0; t < n; ++t) { store_f(out[t], sum[t]); }                                                      \
    }                                                                                                                 \
                                                                                                                      \
    /* As many of n tokens as one pass takes: their number. */                                                       \
    static int mul_panel_some_##name(const uint8_t * x, int nb, const struct grid * grid, const struct many * y, int n, float * const * out) { \
        if (TOKENS >= 16 && n >= 16) { mul_panel_##name(x, nb, grid, y, 16, out); return 16; }                        \
        if (TOKENS >=  8 && n >=  8) { mul_panel_##name(x, nb, grid, y,  8, out); return  8; }                        \
        if (n >= 4)                  { mul_panel_##name(x, nb, grid, y,  4, out); return  4; }                        \
        if (n >= 2)                  { mul_panel_##name(x, nb, grid, y,  2, out); return  2; }                        \
        mul_panel_##name(x, nb, grid, y, 1, out);                                                                     \
        return 1;                                                                                                     \
    }                                                                                                                 \
                                                                                                                      \
    static void decode_##name(const uint8_t * x, int nb, const struct grid * grid, const ggml_half * scales, tile * to) { \
        GGML_UNUSED(grid);                                                                                            \
        const size_t size = sizeof(splitq_block_##name);                                                              \
        const vec_##kind table = load_table_##kind(name);                                                             \
        for (int b = 0; b < nb; ++b, x += LANES*size) {                                                               \
            vec_b w[8];                                                                                               \
            panel_##name(x, table, w);                                                                                \
            arrange_##kind(w);                                                                                        \
            const vec_f d = mul_f(scale(load_d(x + LANES*(size - 1))), set_f(0x1p-4f));                               \
            tile_rows(w, d, scales ? scales + 32*b : NULL, to + b);                                                   \
        }                                                                                                             \
    }

SPLITQ_KERNELS(sq4,  1, scale_f, codes)
SPLITQ_KERNELS(sq3,  2, scale_f, codes)
SPLITQ_KERNELS(sq2,  2, scale_f, codes)
SPLITQ_KERNELS(sdr4, 1, scale_sdr4, codes)
SPLITQ_KERNELS(sq6w, 1, scale_f, windows)
SPLITQ_KERNELS(sq5w, 1, scale_f, windows)
SPLITQ_KERNELS(sq4w, 1, scale_f, windows)
SPLITQ_KERNELS(sq3w, 2, scale_f, windows)
SPLITQ_KERNELS(sq2w, 2, scale_f, windows)
SPLITQ_KERNELS(sq3wo, 2, scale_sq3wo, windows)
SPLITQ_KERNELS(sq2wo, 2, scale_sq2wo, windows)

struct kernels {
    int word; // bytes that are kept together when rows are interleaved
    int units;
    void (*mul_rows)(const char * row, size_t stride, int64_t rows, const char * end, int nb, const struct grid * grid, const struct few * y, float * out);
    int  (*mul_panel)(const uint8_t * x, int nb, const struct grid * grid, const struct many * y, int n, float * const * out);
    void (*decode)(const uint8_t * x, int nb, const struct grid * grid, const ggml_half * scales, tile * to);
};

static const struct kernels * kernels_of(enum ggml_type type) {
    static const struct kernels sq4  = { 4, 1, mul_rows_sq4,  mul_panel_some_sq4, decode_sq4 };
    static const struct kernels sq3  = { 4, 2, mul_rows_sq3,  mul_panel_some_sq3, decode_sq3 };
    static const struct kernels sq2  = { 4, 2, mul_rows_sq2,  mul_panel_some_sq2, decode_sq2 };
    static const struct kernels sdr4 = { 4, 1, mul_rows_sdr4, mul_panel_some_sdr4, decode_sdr4 };
    static const struct kernels sq6w = { 8, 1, mul_rows_sq6w, mul_panel_some_sq6w, decode_sq6w };
    static const struct kernels sq5w = { 8, 1, mul_rows_sq5w, mul_panel_some_sq5w, decode_sq5w };
    static const struct kernels sq4w = { 8, 1, mul_rows_sq4w, mul_panel_some_sq4w, decode_sq4w };
    static const struct kernels sq3w = { 8, 2, mul_rows_sq3w, mul_panel_some_sq3w, decode_sq3w };
    static const struct kernels sq2w = { 8, 2, mul_rows_sq2w, mul_panel_some_sq2w, decode_sq2w };
    static const struct kernels sq3wo = { 8, 2, mul_rows_sq3wo, mul_panel_some_sq3wo, decode_sq3wo };
    static const struct kernels sq2wo = { 8, 2, mul_rows_sq2wo, mul_panel_some_sq2wo, decode_sq2wo };
    static const struct kernels columns = { .word = 4 }; // see columns-mul.h
    switch (type) {
        case GGML_TYPE_SPLITQ_SQ4:  return &sq4;
        case GGML_TYPE_SPLITQ_SQ3:  return &sq3;
        case GGML_TYPE_SPLITQ_SQ2:  return &sq2;
        case GGML_TYPE_SPLITQ_SDR4: return &sdr4;
        case GGML_TYPE_SPLITQ_SQ6W:  return &sq6w;
        case GGML_TYPE_SPLITQ_SQ5W:  return &sq5w;
        case GGML_TYPE_SPLITQ_SQ4WC: // scales of columns are in the activations, with tiles in the weights
        case GGML_TYPE_SPLITQ_SQ4W:  return &sq4w;
        case GGML_TYPE_SPLITQ_SQ3WC:
        case GGML_TYPE_SPLITQ_SQ3W:  return &sq3w;
        case GGML_TYPE_SPLITQ_SQ2WC:
        case GGML_TYPE_SPLITQ_SQ2W:  return &sq2w;
        case GGML_TYPE_SPLITQ_SQ3WO: return &sq3wo;
        case GGML_TYPE_SPLITQ_SQ2WO: return &sq2wo;
        default: return ggml_splitq_has_columns(type) ? &columns : NULL;
    }
}

static const char interleaved; // its address marks tensors

static bool is_interleaved(const struct ggml_tensor * x) {
    return x->extra == (void *) (uintptr_t) &interleaved;
}

int splitq_mul_lanes(const struct ggml_tensor * x) {
    return is_interleaved(x) ? LANES : 1;
}

bool splitq_mul_can_interleave(const struct ggml_tensor * x) {
    return kernels_of(x->type) && x->view_src == NULL && x->ne[1] % LANES == 0 && x->ne[3] == 1;
}

void splitq_mul_interleave(struct ggml_tensor * x, const void * data) {
    const size_t row_size = ggml_row_size(x->type, x->ne[0]), size = ggml_row_size(x->type, SPLITQ_QK);
    for (int64_t r = 0; r < x->ne[1]*x->ne[2]; r += LANES) {
        interleave((const char *) data + r*row_size, row_size, LANES, x->ne[0]/SPLITQ_QK, size, kernels_of(x->type)->word, (uint8_t *) x->data + r*row_size);
    }
    x->extra = (void *) (uintptr_t) &interleaved;
}

bool splitq_mul_claims(const struct ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * y = op->src[1];
    if (ggml_splitq_has_columns(x->type) && !columns_claims(op)) {
        return false;
    }
    return kernels_of(x->type) && x->view_src == NULL && (x->extra == NULL || is_interleaved(x)) && x->ne[3] == 1 && x->nb[0] == ggml_row_size(x->type, SPLITQ_QK) &&
        y->type == GGML_TYPE_F32 && y->nb[0] == sizeof(float) &&
        op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

struct token {
    int32_t i1, i2, i3; // its indices in dst
};

// The tokens of one matrix: of src0, or of one expert.
struct job {
    int64_t matrix, count;
    struct token * tokens; // NULL: all that broadcasting gives this matrix
    char * packed;         // their activations, struct few, struct many or tiles
};

// How an operation's work buffer is used: jobs, tokens of the jobs (both MUL_MAT_ID only), packed activations, and for each
// thread the panels of one chunk of rows and their tiles.
struct layout {
    int64_t nb;                     // blocks in a row
    int64_t chunk;                  // rows of a unit of work
    bool    interleaved;
    bool    side, columns;          // whether there is a side tensor; whether columns-mul.c multiplies, or decodes for tiles
    bool    alone;                  // a single token: each thread packs it for itself and takes its share of the rows
    size_t  few, many;              // bytes of a token's activations
    size_t  tokens, packed, panels; // offsets
    size_t  panel, tiles, size;     // bytes of a thread's panels, of its tiles, of the whole
};

static bool row_by_row(const struct layout * l, int64_t count) {
    return !l->interleaved && !l->columns && count <= SPLITQ_FEW;
}

static bool by_tiles(const struct layout * l, int64_t count) {
    return count >= TILES_FROM && tiles_allowed();
}

static size_t packed_size(const struct layout * l, int64_t count) {
    return by_tiles(l, count) ? (count + TILE - 1)/TILE*l->nb*sizeof(tile) : GGML_PAD(count*(row_by_row(l, count) ? l->few : l->many), 64);
}

static struct layout layout_of(const struct ggml_tensor * op, int n_threads) {
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * ids = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : NULL;
    struct layout l;
    l.nb   = x->ne[0]/SPLITQ_QK;
    l.side    = ggml_splitq_has_columns(x->type);
    l.columns = l.side && !columns_has_windows(x->type);
    l.few  = sizeof(struct few)*((l.nb + LANES - 1)/LANES);
    l.many = l.columns ? columns_token_size(x->ne[0]) : sizeof(struct many)*l.nb;
    l.interleaved = is_interleaved(x);

    const int64_t matrices = x->ne[2];
    const int64_t tokens   = ids ? ids->ne[0]*ids->ne[1] : op->ne[1]*op->ne[2]*op->ne[3]/matrices; // of all experts, of each matrix
    l.alone  = !ids && matrices*tokens == 1 && (l.interleaved || row_by_row(&l, 1));
    l.tokens = ids ? GGML_PAD(sizeof(int64_t) + sizeof(struct job)*matrices, 64) : 0;
    l.packed = l.tokens + (ids ? GGML_PAD(sizeof(struct token)*tokens, 64) : 0);
    const bool tiles = by_tiles(&l, tokens); // of some experts, maybe; each of those fills its last tile up
    const int64_t jobs = MIN(matrices, tokens), tiled = tiles ? MIN(matrices, tokens/TILES_FROM) : 0;
    const size_t token = tiles ? sizeof(tile)/TILE*l.nb : 0;
    l.panels = l.packed + (ids ? tokens*MAX(MAX(l.few, l.many), token) + tiled*TILE*token + 64*jobs : (l.alone ? n_threads : matrices)*packed_size(&l, tokens));
    l.panels = GGML_PAD(l.panels, 64);
    l.chunk = 256;
    while (tiles && l.chunk > 2*LANES && l.chunk*l.nb*sizeof(tile)/LANES > TILES_KEPT) { l.chunk /= 2; }
    while (l.chunk > LANES && (ids ? 1 : matrices)*((x->ne[1] + l.chunk - 1)/l.chunk) < 4*n_threads) {
        l.chunk /= 2;
    }
    l.panel = row_by_row(&l, tokens) || l.interleaved ? 0 : GGML_PAD(ggml_row_size(x->type, x->ne[0])*l.chunk, 64);
    l.tiles = tiles ? l.chunk/LANES*l.nb*sizeof(tile) : 0;
    l.size = l.panels + (l.panel + l.tiles)*n_threads;
    return l;
}

size_t splitq_mul_work_size(int n_threads, const struct ggml_tensor * op) {
    size_t reference = ggml_row_size(GGML_TYPE_Q8_0, op->src[1]->ne[0])*op->src[1]->ne[1]*op->src[1]->ne[2]*op->src[1]->ne[3] + 64;
    if (op->op == GGML_OP_MUL_MAT_ID) { // counts, rows and a counter for each expert, see ggml_graph_plan
        reference += op->src[0]->ne[2]*(sizeof(int64_t) + 64 + 2*sizeof(int32_t)*op->src[2]->ne[0]*op->src[2]->ne[1]) + 256;
    }
    return MAX(reference, layout_of(op, n_threads).size + 64);
}

// MUL_MAT: one job for each matrix.
static struct job job_of(const struct layout * l, const struct ggml_tensor * dst, int64_t i, char * work) {
    const int64_t count = dst->ne[1]*dst->ne[2]*dst->ne[3]/dst->src[0]->ne[2];
    return (struct job) { i, count, NULL, work + l->packed + i*packed_size(l, count) };
}

// Sorts the tokens by expert: jobs for those that have any.
static void route(const struct layout * l, const struct ggml_tensor * ids, int64_t experts, char * work) {
    struct job * jobs = (struct job *) (work + sizeof(int64_t));
    struct token * tokens = (struct token *) (work + l->tokens);
    char * packed = work + l->packed;
    int64_t n = 0;
    for (int64_t e = 0; e < experts; ++e) { jobs[e] = (struct job) { 0 }; }
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            jobs[*(const int32_t *) ((const char *) ids->data + i*ids->nb[0] + t*ids->nb[1])].count++;
        }
    }
    for (int64_t e = 0; e < experts; ++e) {
        jobs[e].matrix = e;
        jobs[e].tokens = tokens; // moves to the end of the expert's tokens below
        tokens += jobs[e].count;
    }
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            struct job * job = &jobs[*(const int32_t *) ((const char *) ids->data + i*ids->nb[0] + t*ids->nb[1])];
            *job->tokens++ = (struct token) { (int32_t) i, (int32_t) t, 0 };
        }
    }
    for (int64_t e = 0; e < experts; ++e) {
        if (jobs[e].count) {
            struct job * job = &jobs[n++];
            *job = jobs[e];
            job->tokens -= job->count;
            job->packed  = packed;
            packed += packed_size(l, job->count);
        }
    }
    *(int64_t *) work = n;
}

static inline struct token token_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    if (job->tokens) {
        return job->tokens[t];
    }
    const int64_t repeats = dst->ne[2]/dst->src[0]->ne[2], batch = t/dst->ne[1];
    return (struct token) { (int32_t) (t % dst->ne[1]), (int32_t) (job->matrix*repeats + batch % repeats), (int32_t) (batch/repeats) };
}

static const float * row_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    const struct ggml_tensor * y = dst->src[1];
    const struct token at = token_of(job, dst, t);
    return (const float *) ((const char *) y->data + at.i1 % y->ne[1]*y->nb[1] + at.i2*y->nb[2] + at.i3*y->nb[3]);
}

static float * result_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    const struct token at = token_of(job, dst, t);
    return (float *) ((char *) dst->data + at.i1*dst->nb[1] + at.i2*dst->nb[2] + at.i3*dst->nb[3]);
}

static struct columns_side side_of(const struct job * job, const struct ggml_tensor * dst) {
    return columns_side_at(dst->src[0]->type, (const char *) dst->src[3]->data + job->matrix*dst->src[3]->nb[1]);
}

static struct grid grid_of(const struct layout * l, const struct job * job, const struct ggml_tensor * dst) {
    const struct columns_side side = l->side ? side_of(job, dst) : (struct columns_side) { 0 };
    struct grid grid = { .base = (int) side.base, .shift = (int) side.step/2 }; // of 1, 2, 4
    const int count = side.base ? 2 << columns_bits(dst->src[0]->type) : 0;
    for (int s = 0; s < count; ++s) {
        grid.scales[s] = 0x1p4f*splitq_scale[side.base + side.step*s];
        grid.scales[count + s] = -grid.scales[s];
    }
    return grid;
}

// Thread ith of nth packs its share of each row.
static void pack(const struct layout * l, const struct job * job, const struct ggml_tensor * dst, int ith, int nth) {
    const bool tiles = by_tiles(l, job->count), rows = row_by_row(l, job->count);
    const int64_t n = rows ? (l->nb + LANES - 1)/LANES : l->nb;
    const int first = n*ith/nth, last = n*(ith + 1)/nth;
    const struct kernels * k = kernels_of(dst->src[0]->type);
    const struct columns_side side = l->side ? side_of(job, dst) : (struct columns_side) { 0 };
    for (int64_t t = 0; t < job->count; ++t) {
        if (tiles) {
            const float * x = row_of(job, dst, t);
            tile * y = (tile *) job->packed + t/TILE*l->nb;
            for (int b = first; b < last; ++b) { tile_token(x, side.order, 32*b, y[b].bf16[t % TILE]); }
        } else if (l->columns) {
            columns_pack(&side, row_of(job, dst, t), first, last, t, job->count, job->packed);
        } else if (rows) {
            pack_few(row_of(job, dst, t), side.scale, l->nb, k->units, k->word, first, last, (struct few *) (job->packed + l->few*t));
        } else {
            struct many * y = (struct many *) (job->packed + l->many*t);
            pack_many(row_of(job, dst, t), side.scale, first, last, y);
            for (int b = first; t % 2 && b < last; ++b) { pair(y[b - l->nb].q, y[b].q); }
        }
    }
    for (int64_t t = job->count; tiles && t % TILE; ++t) { // up to a whole tile
        tile * y = (tile *) job->packed + t/TILE*l->nb;
        for (int b = first; b < last; ++b) { memset(y[b].bf16[t % TILE], 0, sizeof(y->bf16[0])); }
    }
}

// Rows [first, last) of one matrix times its tokens, by tiles; x: the rows' panels, decoded into `decoded`.
static void mul_by_tiles(const struct layout * l, const struct job * job, const struct ggml_tensor * dst, int64_t first, int64_t last, const uint8_t * x, tile * decoded) {
    const int64_t panels = (last - first + LANES - 1)/LANES, nb = l->nb;
    const size_t panel_size = LANES*ggml_row_size(dst->src[0]->type, dst->src[0]->ne[0]);
    const struct grid grid = grid_of(l, job, dst);
    const struct columns_side side = l->side ? side_of(job, dst) : (struct columns_side) { 0 };
    struct tile_config before;
    for (int64_t p = 0; p < panels; ++p) {
        if (l->columns) {
            columns_decode(dst->src[0]->type, &side, x + p*panel_size, first + p*LANES, MIN(LANES, last - first - p*LANES), decoded + p*nb);
        } else {
            kernels_of(dst->src[0]->type)->decode(x + p*panel_size, nb, &grid, side.scale, decoded + p*nb);
        }
    }
    tiles_begin(&before);
    for (int64_t t = 0; t < job->count; t += 2*TILE) {
        const int64_t tokens = MIN(2*TILE, job->count - t);
        float * out[2*TILE];
        for (int i = 0; i < tokens; ++i) { out[i] = result_of(job, dst, t + i) + first; }
        for (int64_t p = 0; p < panels; p += 2) {
            float sums[2*TILE][2][TILE];
            const int64_t rows = MIN(2*LANES, last - first - LANES*p);
            mul_tiles((const tile *) job->packed + t/TILE*nb, tokens > TILE, decoded + p*nb, rows > LANES, nb, sums);
            for (int i = 0; i < tokens; ++i) { memcpy(out[i] + LANES*p, sums[i], sizeof(float)*rows); }
        }
    }
    tiles_end(&before);
}

// Rows [first, last) of one matrix times its tokens.
static void mul(const struct layout * l, const struct job * job, const struct ggml_tensor * dst, int64_t first, int64_t last, char * panels) {
    const struct ggml_tensor * x = dst->src[0];
    const struct kernels * k = kernels_of(x->type);
    const size_t row_size = ggml_row_size(x->type, x->ne[0]);
    const struct grid grid = grid_of(l, job, dst);
    const char * row = (const char *) x->data + job->matrix*x->nb[2] + first*x->nb[1];
    if (row_by_row(l, job->count)) {
        const char * end = (const char *) x->data + (x->ne[2] - 1)*x->nb[2] + (x->ne[1] - 1)*x->nb[1] + row_size;
        for (int64_t t = 0; t < job->count; ++t) {
            const struct few * y = (const struct few *) (job->packed + l->few*t);
            k->mul_rows(row, x->nb[1], last - first, end, l->nb, &grid, y, result_of(job, dst, t) + first);
        }
        return;
    }
    if (!l->interleaved) {
        for (int64_t r = 0; r < last - first; r += LANES) {
            interleave(row + r*x->nb[1], x->nb[1], MIN(LANES, last - first - r), l->nb, row_size/l->nb, k->word, (uint8_t *) panels + r*row_size);
        }
    }
    const char * panel = l->interleaved ? row : panels;
    if (by_tiles(l, job->count)) {
        mul_by_tiles(l, job, dst, first, last, (const uint8_t *) panel, (tile *) (panels + l->panel));
        return;
    }
    if (l->columns) {
        const struct columns_side side = side_of(job, dst);
        for (int64_t t = 0, n; t < job->count; t += n) {
            float * out[TOKENS];
            for (int i = 0; i < MIN(TOKENS, job->count - t); ++i) { out[i] = result_of(job, dst, t + i) + first; }
            n = columns_mul(x->type, &side, (const uint8_t *) panel, first, last - first, job->packed, t, job->count, out);
        }
        return;
    }
    for (int64_t t = 0, n; t < job->count; t += n) {
        const struct many * y = (const struct many *) (job->packed + l->many*t);
        n = 0;
        for (int64_t r = 0; r < last - first; r += LANES) {
            float   rest[TOKENS][LANES]; // of a panel that is not whole
            float * out[TOKENS];
            const int64_t rows = MIN(LANES, last - first - r);
            for (int i = 0; i < MIN(TOKENS, job->count - t); ++i) {
                out[i] = rows < LANES ? rest[i] : result_of(job, dst, t + i) + first + r;
            }
            n = k->mul_panel((const uint8_t *) panel + r*row_size, l->nb, &grid, y, MIN(TOKENS, job->count - t), out);
            for (int i = 0; i < n && rows < LANES; ++i) {
                memcpy(result_of(job, dst, t + i) + first + r, rest[i], sizeof(float)*rows);
            }
        }
    }
}

// What a thread does of a single token: it packs the token, which costs less than waiting for others to do their part of
// it, and multiplies these rows.
struct share {
    char *  packed;
    int64_t first, last;
};

static struct share share_of(const struct ggml_compute_params * params, const struct ggml_tensor * dst, const struct layout * l) {
    const int64_t rows = dst->src[0]->ne[1], panels = (rows + LANES - 1)/LANES;
    struct job job = job_of(l, dst, 0, (char *) GGML_PAD((uintptr_t) params->wdata, 64));
    job.packed += packed_size(l, 1)*params->ith;
    pack(l, &job, dst, 0, 1);
    return (struct share) { job.packed, panels*params->ith/params->nth*LANES, MIN(panels*(params->ith + 1)/params->nth*LANES, rows) };
}

static void mul_share(const struct ggml_tensor * dst, const struct layout * l, struct share share) {
    const struct job job = { 0, 1, NULL, share.packed };
    if (share.first < share.last) {
        mul(l, &job, dst, share.first, share.last, NULL);
    }
}

int splitq_mul_forward_fused(const struct ggml_compute_params * params, struct ggml_tensor * const * nodes) {
    const struct ggml_tensor * a = nodes[0], * b = nodes[1];
    if (params->use_ref || a->src[0]->type != b->src[0]->type || is_interleaved(a->src[0]) != is_interleaved(b->src[0])) { // packed differently
        return 0;
    }
    const struct layout l = layout_of(a, params->nth);
    if (!l.alone) {
        return 0;
    }
    const struct share share = share_of(params, a, &l);
    mul_share(a, &l, share);
    mul_share(b, &l, l.side ? share_of(params, b, &l) : share); // columns' scales are in the activations
    const float * gate = a->data, * up = b->data;
    ggml_vec_swiglu_f32((int) (share.last - share.first), (float *) nodes[2]->data + share.first, gate + share.first, up + share.first);
    return 2;
}

bool splitq_mul_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref && !is_interleaved(dst->src[0])) { // ggml's own path cannot read these
        return false;
    }
    const int ith = params->ith, nth = params->nth;
    const struct ggml_tensor * x = dst->src[0];
    const bool experts = dst->op == GGML_OP_MUL_MAT_ID;
    const struct layout l = layout_of(dst, nth);
    char * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    GGML_ASSERT(work + l.size <= (char *) params->wdata + params->wsize);

    if (l.alone) {
        const struct share share = share_of(params, dst, &l);
        mul_share(dst, &l, share);
        return true;
    }
    int64_t n_jobs = x->ne[2];
    if (experts) {
        if (ith == 0) {
            route(&l, dst->src[2], x->ne[2], work);
        }
        ggml_barrier(params->threadpool);
        n_jobs = *(const int64_t *) work;
    }
#define SPLITQ_JOB(i) (experts ? ((const struct job *) (work + sizeof(int64_t)))[i] : job_of(&l, dst, i, work))
    for (int64_t i = 0; i < n_jobs; ++i) {
        const struct job job = SPLITQ_JOB(i);
        pack(&l, &job, dst, ith, nth);
    }
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t chunks = (x->ne[1] + l.chunk - 1)/l.chunk;
    for (int64_t c = ith; c < n_jobs*chunks; c = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const struct job job = SPLITQ_JOB(c/chunks);
        const int64_t first = c % chunks*l.chunk;
        mul(&l, &job, dst, first, MIN(first + l.chunk, x->ne[1]), work + l.panels + (l.panel + l.tiles)*ith);
    }
    return true;
}

#else // no kernels for this instruction set: ggml's own path, with splitq_vec_dot_*

int splitq_mul_lanes(const struct ggml_tensor * x) {
    GGML_UNUSED(x);
    return 1;
}

bool splitq_mul_can_interleave(const struct ggml_tensor * x) {
    GGML_UNUSED(x);
    return false;
}

void splitq_mul_interleave(struct ggml_tensor * x, const void * data) {
    GGML_UNUSED(x), GGML_UNUSED(data);
}

bool splitq_mul_claims(const struct ggml_tensor * op) {
    GGML_UNUSED(op);
    return false;
}

size_t splitq_mul_work_size(int n_threads, const struct ggml_tensor * op) {
    GGML_UNUSED(n_threads), GGML_UNUSED(op);
    return 0;
}

bool splitq_mul_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params), GGML_UNUSED(dst);
    return false;
}

int splitq_mul_forward_fused(const struct ggml_compute_params * params, struct ggml_tensor * const * nodes) {
    GGML_UNUSED(params), GGML_UNUSED(nodes);
    return 0;
}

#endif
