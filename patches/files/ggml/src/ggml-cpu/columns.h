// SPDX-License-Identifier: MIT
// Matrix products of weights that have a side tensor, see ggml-columns.h, which is the operation's src[3]: what they are by
// definition, on every processor. Kernels are in columns-mul.c.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether this is a product that can be computed: ggml's own path cannot.
bool columns_claims(const struct ggml_tensor * op);

size_t columns_work_size(int n_threads, const struct ggml_tensor * op);

// Decodes each row and multiplies it with the activations as they are. Called by every thread.
// `lanes`: how many rows of the weights stand side by side, see splitq-mul.h.
void columns_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst, int lanes);

#ifdef __cplusplus
}
#endif
