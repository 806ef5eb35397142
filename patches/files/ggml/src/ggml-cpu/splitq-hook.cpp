// SPDX-License-Identifier: MIT
// Hands MUL_MAT and MUL_MAT_ID with weights of this project's types to splitq-mul.c, columns.c and sdr-a4.c, wherever on the
// CPU the weights are.
// In this buffer type, which llama.cpp prefers unless told --no-repack, they are interleaved at load; with --no-repack they
// stay in the memory-mapped file.
#include "splitq-hook.h"

#include "columns.h"
#include "sdr-a4.h"
#include "splitq-mul.h"
#include "traits.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

class columns_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = columns_work_size(n_threads, op);
        if (splitq_mul_claims(op)) {
            size = std::max(size, splitq_mul_work_size(n_threads, op));
        }
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (!params->use_ref && splitq_mul_claims(op)) {
            return splitq_mul_forward(params, op);
        }
        columns_forward(params, op, splitq_mul_lanes(op->src[0]));
        return true;
    }
};

class razored_traits : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = sdr_a4_work_size(op);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        return sdr_a4_forward(params, op);
    }
};

// Whether sdr4 weights meet activations of 4 bits here: sdr-a4.c reads them as they are in the file.
bool razored(const ggml_tensor * op) {
    static const char * wanted = getenv("SPLITQ_W4A4");
    static const bool   is_one = wanted && std::string(wanted) == "1";
    return is_one && sdr_a4_claims(op);
}

class hook : public ggml::cpu::extra_buffer_type {
    // of an operation whose weights are, or would be, in this buffer type
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * x = op->src[0];
        const ggml_tensor * y = op->src[1];
        return !razored(op) && splitq_mul_claims(op) && ggml_n_dims(x) == (op->op == GGML_OP_MUL_MAT ? 2 : 3) && splitq_mul_can_interleave(x) &&
               x->buffer && x->buffer->buft == splitq_hook_buffer_type() &&
               (!y->buffer || ggml_backend_buft_is_host(y->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static traits instance;
        static columns_traits columns;
        static razored_traits four_bits;
        if (razored(op)) {
            return &four_bits;
        }
        if (columns_claims(op)) {
            return &columns;
        }
        return splitq_mul_claims(op) ? &instance : nullptr;
    }
};

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_SPLITQ";
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    splitq_mul_interleave(tensor, data);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer == nullptr) {
        return nullptr;
    }
#if defined(__linux__)
    // decoding reads all of it for every token: a third faster in large pages
    const uintptr_t page = 2 << 20, start = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t first = (start + page - 1)/page*page, last = (start + size)/page*page;
    if (first < last) {
        madvise((void *) first, last - first, MADV_HUGEPAGE);
    }
#endif
    buffer->buft              = buft;
    buffer->iface.set_tensor  = set_tensor;
    buffer->iface.get_tensor  = nullptr;
    buffer->iface.cpy_tensor  = nullptr;
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

// Whether two tensors share no byte of memory.
bool apart(const ggml_tensor * a, const ggml_tensor * b) {
    const char * p = (const char *) a->data, * q = (const char *) b->data;
    return p + ggml_nbytes(a) <= q || q + ggml_nbytes(b) <= p;
}

// Whether the three operations may run without barriers between them, one thread ahead of another. Memory was assigned for
// the order with barriers, in which the activations are free once `up` is done and may become the result's: then a fast
// thread would overwrite what a slow one still reads. The result may take the place of gate or up, since a thread reads there
// only rows that it writes itself, but only the very same place.
bool may_run_ahead(const ggml_tensor * gate, const ggml_tensor * up, const ggml_tensor * glu) {
    const ggml_tensor * x = gate->src[1];
    const auto in_place = [&](const ggml_tensor * a) { return glu->data == a->data || apart(glu, a); };
    return apart(x, gate) && apart(x, up) && apart(x, glu) && apart(gate, up) && in_place(gate) && in_place(up);
}

}  // namespace

bool splitq_hook_denies(const ggml_tensor * op) {
    const bool columns = ggml_splitq_has_columns(op->type) || (op->src[0] && ggml_splitq_has_columns(op->src[0]->type));
    return columns && !columns_claims(op);
}

int splitq_hook_forward_fused(const ggml_compute_params * params, ggml_tensor * const * nodes, int n) {
    const auto ours = [](const ggml_tensor * op) { return splitq_mul_claims(op) && !razored(op); };
    if (n < 3 || !ours(nodes[0]) || !ours(nodes[1]) || nodes[2]->op != GGML_OP_GLU) {
        return 0;
    }
    const ggml_tensor * gate = nodes[0], * up = nodes[1], * glu = nodes[2];
    const bool swiglu = ggml_get_glu_op(glu) == GGML_GLU_OP_SWIGLU && glu->src[0] == gate && glu->src[1] == up;
    const bool wanted = up->flags & glu->flags & GGML_TENSOR_FLAG_COMPUTE;
    return swiglu && wanted && gate->src[1] == up->src[1] && ggml_are_same_shape(gate->src[0], up->src[0]) &&
                   gate->op == GGML_OP_MUL_MAT && up->op == GGML_OP_MUL_MAT && may_run_ahead(gate, up, glu) ?
                   splitq_mul_forward_fused(params, nodes) : 0;
}

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
