// SPDX-License-Identifier: MIT
#include "llama-splitq.h"

#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>

static const char * const CONTAINER_VERSION = "gguf_splitq.container.version"; // 1
static const char * const CONTAINER_TENSORS = "gguf_splitq.container.tensors"; // their names
static const char * const CONTAINER_TYPES   = "gguf_splitq.container.types";   // their types' ids
static const char * const CONTAINER_KEYS[]  = { CONTAINER_VERSION, CONTAINER_TENSORS, CONTAINER_TYPES };

// Whether a file is a container, and to be seen as one.
static bool is_container(const gguf_context * keys) {
    const char * compat = getenv("OLLAMA_LLAMA_CPP_COMPAT");
    const auto has = [&](const char * name) { return gguf_find_key(keys, name) >= 0; };
    return std::any_of(std::begin(CONTAINER_KEYS), std::end(CONTAINER_KEYS), has) && !(compat && std::string(compat) == "0");
}

static int64_t array_key(const gguf_context * keys, const char * name, gguf_type type) {
    const int64_t key = gguf_find_key(keys, name);
    if (key < 0 || gguf_get_kv_type(keys, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(keys, key) != type) {
        throw std::runtime_error(format("the file is a container, but key %s is missing or not an array of the right type", name));
    }
    return key;
}

// Gives a tensor of bytes a type; what is wrong with that, NULL if nothing.
static const char * give_type(ggml_tensor * tensor, ggml_type type) {
    if (tensor->type == type) {
        return nullptr;
    }
    if (tensor->type != GGML_TYPE_I8) {
        return "has another type";
    }
    const int64_t size = ggml_type_size(type), row = tensor->ne[0];
    if (row % size != 0 || ggml_nelements(tensor) == 0 || ggml_nbytes(tensor) > SIZE_MAX/256) { // so that weights can be counted
        return "has rows that are no whole number of blocks";
    }
    tensor->type  = type;
    tensor->nb[0] = size;
    tensor->ne[0] = row/size*ggml_blck_size(type);
    return nullptr;
}

void llama_splitq_open_container(const gguf_context * keys, const std::vector<ggml_context *> & contexts) {
    if (!is_container(keys)) {
        return;
    }
    const int64_t version = gguf_find_key(keys, CONTAINER_VERSION);
    if (version < 0 || gguf_get_kv_type(keys, version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(keys, version) != 1) {
        throw std::runtime_error(format("key %s is not 1: this build reads no other containers", CONTAINER_VERSION));
    }
    const int64_t names = array_key(keys, CONTAINER_TENSORS, GGUF_TYPE_STRING);
    const int64_t types = array_key(keys, CONTAINER_TYPES,   GGUF_TYPE_UINT32);
    const size_t count = gguf_get_arr_n(keys, names);
    if (gguf_get_arr_n(keys, types) != count) {
        throw std::runtime_error(format("keys %s and %s are not of the same length", CONTAINER_TENSORS, CONTAINER_TYPES));
    }

    std::unordered_map<std::string, ggml_tensor *> tensors;
    for (ggml_context * ctx : contexts) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) { tensors[ggml_get_name(t)] = t; }
    }
    std::unordered_set<std::string> seen;
    const uint32_t * ids = (const uint32_t *) gguf_get_arr_data(keys, types);
    for (size_t i = 0; i < count; ++i) {
        const std::string name = gguf_get_arr_str(keys, names, i);
        const auto found = tensors.find(name);
        const char * wrong = nullptr;
        switch (ids[i]) {
            GGML_SPLITQ_TYPES(GGML_SPLITQ_CASE) break;
            default: wrong = "is given a type that is none of gguf-splitq's";
        }
        if (!wrong) { wrong = found == tensors.end() ? "is not there" : !seen.insert(name).second ? "is there twice" : nullptr; }
        if (!wrong) { wrong = give_type(found->second, (ggml_type) ids[i]); }
        if (wrong) {
            throw std::runtime_error(format("tensor '%s', which key %s lists with type %u, %s", name.c_str(), CONTAINER_TENSORS, ids[i], wrong));
        }
    }
}

void llama_splitq_close_container(gguf_context * keys) {
    if (is_container(keys)) {
        for (const char * name : CONTAINER_KEYS) { gguf_remove_key(keys, name); }
    }
}

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
    std::vector<ggml_context *> contexts;
    for (const auto & ctx : ml.contexts) { contexts.push_back(ctx.get()); }
    llama_splitq_open_container(ml.metadata, contexts);

    ml.n_elements = 0;
    for (const auto & it : ml.weights_map) {
        ml.n_elements += weight_of(ml, it.second.tensor) ? 0 : ggml_nelements(it.second.tensor);
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
