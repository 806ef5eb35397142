// SPDX-License-Identifier: MIT
// Kernels of the types that have a side tensor, for splitq-mul.c, which spreads the work; only where there are vectors for them.
#pragma once

#include "ggml-columns.h"
#include "splitq-amx.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of a token's activations.
size_t columns_token_size(int64_t columns);

// 32 floats as q8_0, but with a float for a scale, which it returns: activations times scales of columns can be too small for
// a half. sum: of the integers.
float columns_quantize(const float * x, int8_t * q, int32_t * sum);

// Packs blocks [first, last) of token t of `count`, which share `packed`: scaled, in the order of the stored columns, as
// 8-bit integers; for outliers also as they are.
void columns_pack(const struct columns_side * side, const float * x, int first, int last, int64_t t, int64_t count, char * packed);

// Rows [row, row + rows) times tokens from t on, as many as one pass takes: their number. x: the rows, interleaved;
// out[i]: where the results of the rows go for token t + i.
int columns_mul(enum ggml_type type, const struct columns_side * side, const uint8_t * x, int64_t row, int64_t rows,
             const char * packed, int64_t t, int64_t count, float * const * out);

// Rows [row, row + rows), at most LANES, for tiles: scales of rows and columns multiplied in, outliers added, the columns in the
// order in which they are stored. x: the rows, interleaved.
void columns_decode(enum ggml_type type, const struct columns_side * side, const uint8_t * x, int64_t row, int64_t rows, tile * to);

#ifdef __cplusplus
}
#endif
