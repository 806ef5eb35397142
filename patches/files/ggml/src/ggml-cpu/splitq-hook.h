// Where the CPU back end asks for the hook.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

// An extra buffer type of the CPU back end: claims operations by the type of their weights, and interleaves weights that
// are placed in it.
ggml_backend_buffer_type_t splitq_hook_buffer_type(void);
