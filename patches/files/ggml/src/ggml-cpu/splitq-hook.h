// Where the CPU back end asks for the hook.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

// An extra buffer type of the CPU back end that claims operations and holds no tensors.
ggml_backend_buffer_type_t splitq_hook_buffer_type(void);
