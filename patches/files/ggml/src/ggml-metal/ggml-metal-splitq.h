// SPDX-License-Identifier: MIT
// What the host needs to know of the kernels in kernels/splitq.h, which includes this, too.
#pragma once

#define N_R0_SPLITQ 2  // rows of a simdgroup
#define N_SG_SPLITQ 2  // simdgroups of a threadgroup

#ifndef __METAL_VERSION__

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#define GGML_METAL_SPLITQ_CASES \
    case GGML_TYPE_SPLITQ_SQ4:  case GGML_TYPE_SPLITQ_SQ3:  case GGML_TYPE_SPLITQ_SQ2: \
    case GGML_TYPE_SPLITQ_SQ6W: case GGML_TYPE_SPLITQ_SQ5W: \
    case GGML_TYPE_SPLITQ_SQ4W: case GGML_TYPE_SPLITQ_SQ3W: case GGML_TYPE_SPLITQ_SQ2W:

// Whether Metal has no kernel for weights of this type.
static inline bool ggml_metal_splitq_denies(enum ggml_type type) {
    switch (type) {
#if defined(GGML_METAL_SPLITQ)
        GGML_METAL_SPLITQ_CASES return false;
#endif
        default: return type >= GGML_TYPE_SPLITQ_SQ4;
    }
}

// How splitq_mul_mv is launched.
static inline void ggml_metal_splitq_mul_mv(int * simdgroups, int * rows, size_t * threadgroup_memory) {
    *simdgroups = N_SG_SPLITQ;
    *rows = N_R0_SPLITQ;
    *threadgroup_memory = 128*sizeof(float);
}

#endif
