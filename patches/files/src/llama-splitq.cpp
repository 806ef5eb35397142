#include "llama-splitq.h"

#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

// The name with one ending instead of another; empty if it does not have it.
static std::string with_ending(const std::string & name, const std::string & ending, const std::string & other) {
    const size_t stem = name.size() - ending.size();
    return name.size() > ending.size() && name.compare(stem, ending.size(), ending) == 0 ? name.substr(0, stem) + other : "";
}

// The weight that a tensor is the side tensor of, else NULL.
static const ggml_tensor * weight_of(const llama_model_loader & ml, const ggml_tensor * tensor) {
    if (tensor->type != GGML_TYPE_I8) {
        return nullptr;
    }
    const ggml_tensor * weight = ml.get_tensor_meta(with_ending(ggml_get_name(tensor), "columns", "weight").c_str());
    return weight && ggml_splitq_has_columns(weight->type) ? weight : nullptr;
}

void llama_splitq_prepare(llama_model_loader & ml) {
    for (const auto & it : ml.weights_map) {
        if (weight_of(ml, it.second.tensor)) {
            ml.n_elements -= ggml_nelements(it.second.tensor);
        }
    }
}

ggml_tensor * llama_splitq_side_tensor(const llama_model_loader & ml, const ggml_tensor * weight, bool whole) {
    if (!ggml_splitq_has_columns(weight->type)) {
        return nullptr;
    }
    const char * name = ggml_get_name(weight), * type = ggml_type_name(weight->type);
    const std::string beside = with_ending(name, "weight", "columns");
    ggml_tensor * side = ml.get_tensor_meta(beside.c_str());
    if (side == nullptr) {
        throw std::runtime_error(format("tensor '%s' has type %s and no side tensor: '%s' is missing", name, type, beside.c_str()));
    }
    if (side->type != GGML_TYPE_I8 || side->ne[0] % 32 != 0 ||
            side->ne[1] != weight->ne[2] || side->ne[2] != 1 || side->ne[3] != 1 || weight->ne[3] != 1) {
        throw std::runtime_error(format("tensor '%s' has the wrong type or shape for the side tensor of '%s': %s %s",
            beside.c_str(), name, ggml_type_name(side->type), llama_format_tensor_shape(side).c_str()));
    }
    if (!whole) {
        throw std::runtime_error(format("tensor '%s' cannot be of type %s", name, type));
    }
    return side;
}

void llama_splitq_skip(llama_model_loader & ml, const ggml_tensor * side) {
    if (side) {
        ml.size_data -= ggml_nbytes(side);
        ml.n_created++;
    }
}

ggml_tensor * llama_splitq_create(llama_model_loader & ml, const ggml_tensor * side, ggml_context * ctx) {
    ggml_tensor * created = ggml_get_tensor(ctx, ggml_get_name(side));
    if (!created) {
        created = ggml_dup_tensor(ctx, side);
        ggml_set_name(created, ggml_get_name(side));
        ml.n_created++;
    }
    return created;
}

void llama_splitq_check_loaded(const llama_model_loader & ml, const ggml_tensor * tensor) {
    const ggml_tensor * weight = weight_of(ml, tensor);
    for (int64_t i = 0; weight && i < tensor->ne[1]; ++i) {
        const char * data  = (const char *) tensor->data + i*tensor->nb[1];
        const char * wrong = ggml_splitq_check_columns(weight->type, weight->ne[0], weight->ne[1], data, tensor->nb[1]);
        if (wrong) {
            throw std::runtime_error(format("tensor '%s' %s", ggml_get_name(tensor), wrong));
        }
    }
}

void llama_splitq_check_target(const ggml_tensor * tensor, ggml_type target) {
    if (ggml_splitq_has_columns(target) && target != tensor->type) {
        throw std::runtime_error(format("tensor '%s': type %s cannot be made here; use gguf-splitq convert --type %s",
            ggml_get_name(tensor), ggml_type_name(target), ggml_type_name(target)));
    }
}

bool llama_splitq_keeps_cache(const llama_model & model, ggml_type type_k, ggml_type type_v) {
    const bool keeps = type_k >= GGML_TYPE_SPLITQ_SQ4 || type_v >= GGML_TYPE_SPLITQ_SQ4;
    if (keeps && !model.devices.empty()) {
        LLAMA_LOG_WARN("%s: cache types K (%s), V (%s): one of them runs on the CPU only, the cache stays in main memory\n",
                __func__, ggml_type_name(type_k), ggml_type_name(type_v));
    }
    return keeps;
}
