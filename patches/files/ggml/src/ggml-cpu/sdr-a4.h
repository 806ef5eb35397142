// SPDX-License-Identifier: MIT
// MUL_MAT and MUL_MAT_ID of sdr4 weights with activations razored to 4 bits; used when SPLITQ_W4A4=1 is in the environment.
// For measuring what QRazor's integer-only arithmetic costs: each row is multiplied with each token by itself.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// The functions are those of splitq-mul.h.
bool   sdr_a4_claims(const struct ggml_tensor * op);
size_t sdr_a4_work_size(const struct ggml_tensor * op);
bool   sdr_a4_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
