// SPDX-License-Identifier: MIT
// Tensor types of the SplitQuantV2 family: block layouts, scales, reference encoders and decoders.
// docs/format.md of gguf-splitq draws the same bytes; gguf_splitq/types/ holds the NumPy twins.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPLITQ_QK 32
#define SPLITQ_QK_SQ4X  256

// Codes are laid out so that one shift and one mask give 32 consecutive codes in order:
//   4-bit: byte j holds codes j (low nibble) and j + 16 (high nibble)
//   2-bit: byte j holds codes j, j + 8, j + 16, j + 24, lowest bits first
//   1-bit: bit i of the little-endian word belongs to code i

typedef struct {
    uint8_t qs[16];  // 4-bit codes
    uint8_t d;       // scale
} splitq_block_sq4;

typedef struct {
    uint8_t qs[8];   // low two bits of the codes
    uint8_t qh[4];   // high bit of the codes
    uint8_t d;       // scale
} splitq_block_sq3;

typedef struct {
    uint8_t qs[8];   // 2-bit codes
    uint8_t d;       // scale
} splitq_block_sq2;

// The published split: every weight names its range (lower, middle, upper) and a 4-bit code inside it.
typedef struct {
    ggml_half scale[3];  // weight = min[range] + scale[range] * code
    ggml_half min[3];
    struct {
        uint8_t range[8];  // 2-bit
        uint8_t qs[16];    // 4-bit codes
    } sub[SPLITQ_QK_SQ4X / 32];
} splitq_block_sq4x;

#ifndef __cplusplus
_Static_assert(sizeof(splitq_block_sq4)  ==  17, "sq4 block size");
_Static_assert(sizeof(splitq_block_sq3)  ==  13, "sq3 block size");
_Static_assert(sizeof(splitq_block_sq2)  ==   9, "sq2 block size");
_Static_assert(sizeof(splitq_block_sq4x) == 204, "sq4x block size");
#endif

// The scale byte: sign, 4 exponent bits, 3 mantissa bits, subnormals, no infinity, no NaN. The sign mirrors
// the codebook. Unit in the last place of a subnormal: 2^-21; largest: 15 * 2^-7.
#define SPLITQ_SCALE_ULP 0x1p-21f
#define SPLITQ_SCALE_MAX 0x1.ep-4f
#define SPLITQ_ROW(u)     8*(u), 9*(u), 10*(u), 11*(u), 12*(u), 13*(u), 14*(u), 15*(u)
#define SPLITQ_HALF(u)    0*(u), 1*(u), 2*(u), 3*(u), 4*(u), 5*(u), 6*(u), 7*(u), \
    SPLITQ_ROW((u)*0x1p0f),  SPLITQ_ROW((u)*0x1p1f),  SPLITQ_ROW((u)*0x1p2f),  SPLITQ_ROW((u)*0x1p3f), \
    SPLITQ_ROW((u)*0x1p4f),  SPLITQ_ROW((u)*0x1p5f),  SPLITQ_ROW((u)*0x1p6f),  SPLITQ_ROW((u)*0x1p7f), \
    SPLITQ_ROW((u)*0x1p8f),  SPLITQ_ROW((u)*0x1p9f),  SPLITQ_ROW((u)*0x1p10f), SPLITQ_ROW((u)*0x1p11f), \
    SPLITQ_ROW((u)*0x1p12f), SPLITQ_ROW((u)*0x1p13f), SPLITQ_ROW((u)*0x1p14f)
static const float splitq_scale[256] = { SPLITQ_HALF(SPLITQ_SCALE_ULP), SPLITQ_HALF(-SPLITQ_SCALE_ULP) };
#undef SPLITQ_ROW
#undef SPLITQ_HALF

// splitq_levels_sq4[16], splitq_levels_sq3[8], splitq_levels_sq2[4]
#define SPLITQ_LEVELS(name, down, up, lower, middle, upper) static const int8_t splitq_levels_##name[] = { lower, middle, upper };
#include "ggml-splitq-levels.h"
#undef SPLITQ_LEVELS

GGML_API void splitq_quantize_row_sq4 (const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq3 (const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq2 (const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq4x(const float * x, void * y, int64_t k);

GGML_API void splitq_dequantize_row_sq4 (const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq3 (const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq2 (const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq4x(const void * x, float * y, int64_t k);

// The part of ggml_quantize_chunk and ggml_validate_row_data for types whose rows are decoded one by one, and for all types.
GGML_API size_t splitq_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API bool   splitq_validate_blocks(enum ggml_type type, const void * data, size_t nblocks);

// For converters. F32, F16 or BF16 to float; returns the largest magnitude, infinity if not all are finite.
GGML_API float splitq_widen(enum ggml_type type, const void * src, float * dst, int64_t n);
// What a quantized type that decodes row by row makes of x: the sums of x^2 and of the errors' squares, the largest error.
GGML_API void splitq_errors(enum ggml_type type, const void * data, const float * x, int64_t n, double * sums);

#ifdef __cplusplus
}
#endif
