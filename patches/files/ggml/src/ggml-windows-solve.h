// SPDX-License-Identifier: MIT
// What gguf_splitq/runtime/native.py calls to code window types against a Hessian.
#pragma once

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// As of `Sweep` in gguf_splitq/coding/windows.py; arrays of more than one dimension have the last one's values side by side.
typedef struct {
    int32_t bits;            // of a code: 6 to 2
    int32_t n_scales;        // at most 32
    int32_t closed;          // scales of a row whose free chains are closed; 0: chains are open, and all of them
    int64_t n_rows;
    const float * levels;    // [64] or, of 6 and 5 bits, [128], by edge
    const float * aims;      // [32][n_rows]
    const float * base;      // [32][n_rows]
    const float * scales;    // [n_scales][n_rows]
    const float * push;      // [32][32], or NULL for none
    const float * costs;     // [32]
    const uint8_t * states;  // [chains][n_rows], or NULL
    uint8_t * edges;         // [32][n_rows], to be found
    int64_t * choice;        // [n_rows], to be found
} splitq_sweep;

GGML_API void splitq_windows_sweep(const splitq_sweep * sweep);

// What is the same for all blocks of a matrix. Of a block's scale byte, n_scales others are tried: its magnitude plus added[i],
// cut to 0 .. positive - 1, its sign bit turned by turned[i].
typedef struct {
    int32_t bits, n_scales, closed, positive;
    const float * levels;
    const float * table;     // [256], the scale of each byte
    const int32_t * added;
    const int32_t * turned;  // 0 or 128
} splitq_windows_kind;

// Blocks one after the other; what a block changes from `base` times push[i][j] moves the aim of each later column, j. Matrices
// are [32 n_blocks][n_rows], push has `width` floats in a row and is NULL for none, states are [n_blocks][chains][n_rows] or NULL.
// Sets edges, changes (from base) and params, [n_blocks][n_rows], the scale bytes.
GGML_API void splitq_windows_code(const splitq_windows_kind * kind, int32_t n_blocks, int64_t n_rows, const float * aims, const float * base,
                                  const float * push, int64_t width, const float * costs, const uint8_t * states, uint8_t * params,
                                  uint8_t * edges, float * changes);

// As splitq_solve_search, for blocks that all have n_scales scales and begin and end in the state that they are in. `columns` are
// those of these blocks, and params and edges are of all.
GGML_API void splitq_windows_search(const splitq_windows_kind * kind, int32_t n_blocks, const int64_t * blocks, const int64_t * columns,
                                    int64_t n_rows, const float * values, const float * pull, const float * inverse, const float * push,
                                    const float * h, const float * costs, uint8_t * params, uint8_t * edges, float * changes);

#ifdef __cplusplus
}
#endif
