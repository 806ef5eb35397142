// SPDX-License-Identifier: MIT
// What the host needs to know of the kernels in kernels/splitq.h, which includes this, too.
#pragma once

#define N_R0_SPLITQ 2  // rows of a simdgroup
#define N_SG_SPLITQ 2  // simdgroups of a threadgroup

#ifndef __METAL_VERSION__

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

// Whether Metal has no kernel for weights of this type.
static inline bool ggml_metal_splitq_denies(enum ggml_type type) {
#if defined(GGML_METAL_SPLITQ)
    return type >= GGML_TYPE_SPLITQ_SQ4X;
#else
    return type >= GGML_TYPE_SPLITQ_SQ4;
#endif
}

#define GGML_METAL_SPLITQ_CASES case GGML_TYPE_SPLITQ_SQ4: case GGML_TYPE_SPLITQ_SQ3: case GGML_TYPE_SPLITQ_SQ2:

// How splitq_mul_mv is launched.
static inline void ggml_metal_splitq_mul_mv(int * simdgroups, int * rows, size_t * threadgroup_memory) {
    *simdgroups = N_SG_SPLITQ;
    *rows = N_R0_SPLITQ;
    *threadgroup_memory = 16*sizeof(float);
}

#endif
