// SPDX-License-Identifier: MIT
// Matrix products of the SplitQuantV2 family that see the whole operation, MUL_MAT and MUL_MAT_ID. Weights are either as
// in the file, or interleaved: as many rows as a vector has lanes side by side, which takes no more memory and is faster.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether this build has a kernel for the operation: false for other operations, types, layouts and instruction sets.
bool splitq_mul_claims(const struct ggml_tensor * op);

// Bytes of work buffer for a claimed operation; enough for ggml's own path as well, which use_ref selects.
size_t splitq_mul_work_size(int n_threads, const struct ggml_tensor * op);

// Computes a claimed operation, called by every thread. The result does not depend on the number of threads.
// False, and nothing done, with params->use_ref and weights as in the file.
bool splitq_mul_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Computes nodes[0], nodes[1] and nodes[2], which are gate, up and SwiGLU, the first two claimed. A thread needs nothing of
// another's, so nobody waits in between. Called by every thread. Returns 2; for more than one token 0, and nothing is done.
int splitq_mul_forward_fused(const struct ggml_compute_params * params, struct ggml_tensor * const * nodes);

// How many rows of x stand side by side, word by word; 1: as in the file.
int splitq_mul_lanes(const struct ggml_tensor * x);

// Whether x, of this type and shape, can be interleaved.
bool splitq_mul_can_interleave(const struct ggml_tensor * x);

// Fills x from `data`, the whole tensor as in the file, and marks it as interleaved.
void splitq_mul_interleave(struct ggml_tensor * x, const void * data);

#ifdef __cplusplus
}
#endif
