// SPDX-License-Identifier: MIT
// What upstream's files of the CPU back end take from ours.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-sdr.h"
#include "ggml-splitq.h"
#include "ggml-windows.h"
#include "sdr.h"
#include "splitq.h"

// Entries of ggml-cpu.c's type_traits_cpu.
#define SPLITQ_CPU_TRAITS(NAME, name, id, block, size)    \
    [GGML_TYPE_SPLITQ_##NAME] = {                         \
        .from_float   = splitq_quantize_row_##name,       \
        .vec_dot      = splitq_vec_dot_##name##_q8_0,     \
        .vec_dot_type = GGML_TYPE_Q8_0,                   \
        .nrows        = 1,                                \
    },

// An extra buffer type of the CPU back end: claims operations by the type of their weights, and interleaves weights that
// are placed in it.
ggml_backend_buffer_type_t splitq_hook_buffer_type(void);

#ifdef __cplusplus
extern "C" {
#endif

// Whether an operation has weights with a side tensor, or makes some, and is not a product: nothing else can be done.
bool splitq_hook_denies(const struct ggml_tensor * op);

// Computes nodes[0] together with nodes after it, where that saves waiting: how many beyond the first, 0 if nothing was
// done. Called by every thread with the n nodes that are left.
int splitq_hook_forward_fused(const struct ggml_compute_params * params, struct ggml_tensor * const * nodes, int n);

#ifdef __cplusplus
}
#endif
