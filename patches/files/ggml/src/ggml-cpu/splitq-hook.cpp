// Hands MUL_MAT and MUL_MAT_ID with weights of the SplitQuantV2 family to splitq-mul.c. The weights stay in the ordinary
// CPU buffer, memory-mapped: no tensor is ever placed in the buffer type below, it only carries the hook.
#include "splitq-hook.h"

#include "splitq-mul.h"
#include "traits.h"

namespace {

class traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = splitq_mul_work_size(n_threads, op);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        return splitq_mul_forward(params, op);
    }
};

class hook : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override {
        return false;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static traits instance;
        return splitq_mul_claims(op) ? &instance : nullptr;
    }
};

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_SPLITQ";
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t, size_t size) {
    return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

}  // namespace

ggml_backend_buffer_type_t splitq_hook_buffer_type(void) {
    static hook context;
    static ggml_backend_buffer_type buft = {
        /* .iface   = */ { get_name, alloc_buffer, get_alignment, /* .get_max_size = */ nullptr,
                           /* .get_alloc_size = */ nullptr, /* .is_host = */ nullptr },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ &context,
    };
    return &buft;
}
