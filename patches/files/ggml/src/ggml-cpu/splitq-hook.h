// Where the CPU back end asks for the hook.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

// An extra buffer type of the CPU back end: claims operations by the type of their weights, and interleaves weights that
// are placed in it.
ggml_backend_buffer_type_t splitq_hook_buffer_type(void);

#ifdef __cplusplus
extern "C" {
#endif

// Computes nodes[0] together with nodes after it, where that saves waiting: how many beyond the first, 0 if nothing was
// done. Called by every thread with the n nodes that are left.
int splitq_hook_forward_fused(const struct ggml_compute_params * params, struct ggml_tensor * const * nodes, int n);

#ifdef __cplusplus
}
#endif
