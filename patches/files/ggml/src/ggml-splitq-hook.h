// SPDX-License-Identifier: MIT
// What ggml.c and ggml-quants.c take from ours.
#pragma once

#include "ggml-columns.h"
#include "ggml-sdr.h"
#include "ggml-splitq.h"
#include "ggml-windows.h"

// Entries of ggml.c's type_traits. Weights with a side tensor mean nothing without it, so they have no to_float.
#define SPLITQ_TRAITS(NAME, name, block)                  \
        .type_name      = #name,                          \
        .blck_size      = block,                          \
        .type_size      = sizeof(splitq_block_##name),    \
        .is_quantized   = true,
#define SPLITQ_ROW_TRAITS(NAME, name, id, block, size)    \
    [GGML_TYPE_SPLITQ_##NAME] = {                         \
        SPLITQ_TRAITS(NAME, name, block)                  \
        .to_float       = splitq_dequantize_row_##name,   \
        .from_float_ref = splitq_quantize_row_##name,     \
    },
#define SPLITQ_COLUMN_TRAITS(NAME, name, id, block, size) [GGML_TYPE_SPLITQ_##NAME] = { SPLITQ_TRAITS(NAME, name, block) },
