// SPDX-License-Identifier: MIT
// What llama.cpp's own files call for the tensor types of gguf-splitq: in the model loader for containers and for side tensors
// (X.columns beside X.weight, see ggml-columns.h), in llama-quantize, in the KV cache.
#pragma once

#include "ggml.h"
#include "llama.h"

#include <vector>

struct gguf_context;
struct llama_model;
struct llama_model_loader;

// A container is a file that any reader of GGUF takes: tensors of our types are rows of bytes there, and two keys have their
// names and types; docs/format.md of gguf-splitq defines it. Gives the tensors in `contexts`, those of all parts of a file, the
// types and shapes that `keys`, of the first part, has for them. Their bytes and where they are stay the same. Throws, with a
// tensor's name, where the keys cannot be right; does nothing for other files, and under OLLAMA_LLAMA_CPP_COMPAT=0, with which
// Ollama wants files copied as they are.
LLAMA_API void llama_splitq_open_container(const gguf_context * keys, const std::vector<ggml_context *> & contexts);

// What is written has the types themselves: the keys go, unless llama_splitq_open_container did nothing.
void llama_splitq_close_container(gguf_context * keys);

// Once the headers of all parts are read: opens a container; side tensors do not count as parameters.
void llama_splitq_prepare(llama_model_loader & ml);

// The side tensor, as in the file, of a weight whose type has one, else NULL. Throws if it is missing or does not fit, and if
// the weight is not `whole`: to be read row by row, or reshaped.
ggml_tensor * llama_splitq_side_tensor(const llama_model_loader & ml, const ggml_tensor * weight, bool whole);

// For a weight that is ignored: its side tensor, if any, is as well.
void llama_splitq_skip(llama_model_loader & ml, const ggml_tensor * side);

// The side tensor to load, in `ctx`, which another weight may have created before. ggml_mul_mat takes it from the weight's src[0].
ggml_tensor * llama_splitq_create(llama_model_loader & ml, const ggml_tensor * side, ggml_context * ctx);

// Throws if a tensor that has just been loaded is a side tensor that does not fit its weight.
void llama_splitq_check_loaded(const llama_model_loader & ml, const ggml_tensor * tensor);

// Throws if llama-quantize is to make weights that have side tensors, for which ggml has no encoder.
void llama_splitq_check_target(const ggml_tensor * tensor, ggml_type target);

// Whether a cache has to stay in main memory, which is said if it would have been elsewhere: only the CPU back end writes these
// types, and an operation on a cache in another device's memory would abort.
bool llama_splitq_keeps_cache(const llama_model & model, ggml_type type_k, ggml_type type_v);
