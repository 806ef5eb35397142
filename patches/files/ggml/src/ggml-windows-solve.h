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

#ifdef __cplusplus
}
#endif
