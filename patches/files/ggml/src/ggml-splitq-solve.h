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

// The columns of a call, a multiple of 4. All of these have numbers, and the first `wide` of them are wide.
struct splitq_solve_columns {
    int32_t count;
    const int64_t * numbers;
    const int64_t * block; // the row of `scale` and `offset`, [blocks][rows], that each takes
    int64_t wide;
    struct splitq_solve_levels levels;
};

// Rounds column after column to its aim; what it changes from `base` times push[i][j] moves the aim of each later one, j.
// aims, base, units, changes: [count][rows]; push has `width` floats in a row. Sets units and changes.
GGML_API void splitq_solve_sweep(const struct splitq_solve_columns * columns, int64_t rows, const float * aims, const float * base,
                                 const float * push, int64_t width, const float * scale, const float * offset, float * units, float * changes);

// Of a group of columns, in the order of coding: for each row the best of `copies` of the scales, [copies][all][rows], each swept
// by push and then each column given all others by h. inverse: that of h. values, pull, units: of all columns, [columns][rows],
// what is stored now, H (w - values), and the levels, which are set where that lowers the error. changes: [count][rows], of the
// values; taken: [all][rows], the copy that is best for the group's blocks, 0 and no changes where nothing lowers the error.
GGML_API void splitq_solve_search(const struct splitq_solve_columns * columns, int64_t rows, const float * values, const float * pull,
                                  const float * inverse, const float * push, const float * h, int32_t copies, int64_t all,
                                  const float * scale, const float * offset, float * units, float * changes, int64_t * taken);

#define SPLITQ_REFIT_COLUMNS 256 // the most that are refitted in one call, a super-block's
#define SPLITQ_SOLVE_VALUES  128 // of a table

// Which scales and offsets blocks can have.
enum splitq_solve_kind {
    SPLITQ_SOLVE_TABLE, // one of `table` with either sign
    SPLITQ_SOLVE_HALF,  // any finite half
    SPLITQ_SOLVE_STEPS, // whole multiples of a block's steps, of scales from `least` to `most`, of offsets from -`most` to 0
};

struct splitq_solve_grid {
    int32_t kind, least, most;
    const float * table;       // float [SPLITQ_SOLVE_VALUES], rising from 0
    const float * steps;       // [blocks][rows]
    const float * steps_below; // of offsets
};

// Least squares for scale and offset of each block of `size` neighbours in turn, kept where that lowers a row's error.
// units, pull, changes: [count][rows], pull as of the search; h has `width` floats in a row. scale, offset: [blocks][rows], set,
// as changes are; offset: NULL where there are none. second: [count][rows], what an offset is multiplied by, or NULL: by 1.
GGML_API void splitq_solve_refit(const struct splitq_solve_grid * grid, int32_t count, int32_t size, int64_t rows, const float * units,
                                 const float * second, const float * pull, const float * h, int64_t width, float * scale,
                                 float * offset, float * changes);

#ifdef __cplusplus
}
#endif
