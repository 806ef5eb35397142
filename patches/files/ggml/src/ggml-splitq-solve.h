// SPDX-License-Identifier: MIT
// For converters: the inner loops of error feedback (gguf_splitq/coding/solver.py, whose PyTorch code says what they do).
// Matrices have a column of weights in each row: [columns][rows], so that rows lie in the lanes of vectors.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPLITQ_SOLVE_COLUMNS 128 // the most that are swept in one call

// The nearest level of a weight w is table[ceil(2 (w - offset)/scale) - first], cut to 0 .. last - first.
struct splitq_solve_levels {
    const float * plain;   // float [last - first + 1]
    const float * wide;    // of columns that are wide
    int32_t first, last;
};

// The columns of a call, a multiple of 4: block[i] is the row of `scale` and `offset`, [blocks][rows], that column i takes.
struct splitq_solve_columns {
    int32_t count, blocks;
    const int32_t * block;
    const uint8_t * wide;
    struct splitq_solve_levels levels;
};

// Rounds column after column to its aim; what it changes from `base` times push[i][j] moves the aim of each later one, j.
// aims, base, units, changes: [count][rows]; push has `width` floats in a row. Sets units and changes.
GGML_API void splitq_solve_sweep(const struct splitq_solve_columns * columns, int64_t rows, const float * aims, const float * base,
                                 const float * push, int64_t width, const float * scale, const float * offset, float * units, float * changes);

// Of a group of columns, in the order of coding: for each row the best of `copies` of the scales, [copies][blocks][rows], each
// swept by push and then each column given all others by h. units, values, pull: [count][rows], what is stored now and
// h (w - values), for all of h. best: the copy, or -1 where nothing lowers the error; then units and changes are as before and 0.
GGML_API void splitq_solve_search(const struct splitq_solve_columns * columns, int64_t rows, const float * aims, const float * values,
                                  const float * pull, const float * push, const float * h, int32_t copies,
                                  const float * scale, const float * offset, float * units, float * changes, int32_t * best);

#ifdef __cplusplus
}
#endif
