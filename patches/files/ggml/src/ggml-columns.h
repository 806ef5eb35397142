// SPDX-License-Identifier: MIT
// Tensor types after CLAQ (arXiv 2405.17233): every column, an input feature, has something of its own; cq4, cq3 and cq2 a
// codebook, sq3c and sq2c, which are sq3 and sq2 otherwise, a scale, as sq4wc, sq3wc and sq2wc, whose blocks are those of sq4w,
// sq3w and sq2w, and sq3wo and sq2wo, whose chains are open. Codes and scale bytes are in the weight tensor; all else is in a
// side tensor of bytes, X.columns beside X.weight, that the model loader attaches.
// docs/format.md of gguf-splitq draws the same bytes.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-windows.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define COLUMNS_QK    32
#define COLUMNS_MAGIC 0x51414c43u  // "CLAQ"

// 32 columns of one row. A 32-bit word has, at each bit position, the codes of 4 neighbouring columns, one in each byte.
typedef struct {
    uint8_t qs[16];  // byte 4*w + k: codes of columns 8*w + k (low nibble) and 8*w + 4 + k
} splitq_block_cq4;

typedef struct {
    uint8_t qs[8];   // low two bits of the codes, as in cq2
    uint8_t qh[4];   // bit 4*w + i of byte k: the high bit of column 16*w + 4*i + k
} splitq_block_cq3;

typedef struct {
    uint8_t qs[8];   // bits 2*i .. 2*i + 1 of byte 4*w + k: the code of column 16*w + 4*i + k
} splitq_block_cq2;

typedef struct {
    splitq_block_cq3 codes;
    uint8_t d;       // scale, see ggml-splitq.h
} splitq_block_sq3c;

typedef struct {
    splitq_block_cq2 codes;
    uint8_t d;
} splitq_block_sq2c;

typedef splitq_block_sq4w splitq_block_sq4wc;
typedef splitq_block_sq3w splitq_block_sq3wc;
typedef splitq_block_sq2w splitq_block_sq2wc;

// The side tensor of one matrix. Stored column i is input feature order[i];
// weight[r, order[i]] = row[r] * scale[i] * level(i)[code], an outlier's value added; of sq3c and sq2c, with d and the levels
// of the sq type of as many bits, d * scale[i] * level[code]; of window types, which have neither order nor wide blocks, the
// weight without a side tensor, times scale[i]; of open ones see splitq_dequantize_open.
struct columns_side {
    uint32_t rows, columns;
    uint32_t wide;               // how many leading blocks have longer codes, their upper bits in extra
    uint32_t outliers;
    uint32_t base, step;         // of open types: block scale s is splitq_scale[base + step*s]
    const uint16_t  * order;     // NULL: columns are stored in order
    const ggml_half * row;       // filled up with zeros to a multiple of 16; NULL without codebooks
    const ggml_half * scale;
    const int8_t    * levels;    // 16 for each column of a wide block, 2^bits for the others, rising; NULL without codebooks
    const uint8_t   * extra;     // [ceil(rows/16)][wide][words][16 rows][4 bytes], words as qs of cq2 or qh of cq3
    const uint32_t  * start;     // outliers of row r: start[r] .. start[r + 1] - 1
    const uint16_t  * column;    // stored column
    const ggml_half * value;
    size_t size;                 // bytes of all this
};

GGML_API int  columns_bits(enum ggml_type type); // 0 for other types
GGML_API bool columns_has_codebooks(enum ggml_type type);
GGML_API bool columns_has_windows(enum ggml_type type);

// Where things are in the side tensor `data` of one matrix, which ggml_splitq_check_columns (ggml.h) has accepted.
GGML_API struct columns_side columns_side_at(enum ggml_type type, const void * data);

// The levels of a block's first column.
static inline const int8_t * columns_levels(const struct columns_side * side, int bits, uint32_t block) {
    const uint32_t wide = block < side->wide ? block : side->wide;
    return side->levels + (size_t) COLUMNS_QK*(16*wide + ((size_t) (block - wide) << bits));
}

// Bits that a wide block's codes are longer by, which is also the words of them that a row has, and where they are: word w
// at 64*w.
static inline int columns_more_bits(int bits, bool codebooks) {
    return codebooks ? 4 - bits : 1;
}

static inline const uint8_t * columns_extra(const struct columns_side * side, int more, uint32_t row, uint32_t block) {
    return side->extra + ((size_t) row/16*side->wide + block)*more*64 + row % 16*4;
}

// Decodes row r into all its columns in the order of the activations. x: the rows r/lanes*lanes and following, of which
// `lanes` stand side by side, see splitq-mul.h.
GGML_API void columns_decode_row(enum ggml_type type, const struct columns_side * side, const void * x, int lanes, uint32_t r, float * y);

#ifdef __cplusplus
}
#endif
