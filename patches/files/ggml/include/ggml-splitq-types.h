// SPDX-License-Identifier: MIT
// The tensor types of gguf-splitq, once. ggml.h includes this; upstream's enums, tables and switches are filled from it by
// the macros below, one line each, so that a type is added here and not in all of them.
#pragma once

// X(NAME, name, id, block, size): the id is what a file has, of a tensor's type and of a file's, and never changes; block: how
// many weights have bytes of their own; size: for people.
#define GGML_SPLITQ_ROW_TYPES(X) /* whose rows are decoded one by one */ \
    X(SQ4,  sq4,  100,  32, "4.25 bpw")                                  \
    X(SQ3,  sq3,  101,  32, "3.25 bpw")                                  \
    X(SQ2,  sq2,  102,  32, "2.25 bpw")                                  \
    X(SQ4X, sq4x, 103, 256, "6.375 bpw")                                 \
    X(SDR4, sdr4, 104,  32, "4.25 bpw")                                  \
    X(SQ6W, sq6w, 117,  32, "6.25 bpw")                                  \
    X(SQ5W, sq5w, 116,  32, "5.25 bpw")                                  \
    X(SQ4W, sq4w, 110,  32, "4.25 bpw")                                  \
    X(SQ3W, sq3w, 111,  32, "3.25 bpw")                                  \
    X(SQ2W, sq2w, 112,  32, "2.25 bpw")

#define GGML_SPLITQ_COLUMN_TYPES(X) /* with a side tensor, X.columns beside X.weight */ \
    X(CQ4,  cq4,  105,  32, "4 bpw and codebooks")                                      \
    X(CQ3,  cq3,  106,  32, "3 bpw and codebooks")                                      \
    X(CQ2,  cq2,  107,  32, "2 bpw and codebooks")                                      \
    X(SQ2C, sq2c, 108,  32, "2.25 bpw and columns")                                     \
    X(SQ3C, sq3c, 109,  32, "3.25 bpw and columns")                                     \
    X(SQ4WC, sq4wc, 113, 32, "4.25 bpw and columns")                                    \
    X(SQ3WC, sq3wc, 114, 32, "3.25 bpw and columns")                                    \
    X(SQ2WC, sq2wc, 115, 32, "2.25 bpw and columns")                                    \
    X(SQ3WO, sq3wo, 118, 32, "3.25 bpw and columns")                                    \
    X(SQ2WO, sq2wo, 119, 32, "2.25 bpw and columns")

#define GGML_SPLITQ_TYPES(X) GGML_SPLITQ_ROW_TYPES(X) GGML_SPLITQ_COLUMN_TYPES(X)

// GGML_TYPE_SPLITQ_SQ4 and so on
#define GGML_SPLITQ_ENUM(NAME, name, id, block, size) GGML_TYPE_SPLITQ_##NAME = id,
#define GGML_SPLITQ_CASE(NAME, name, id, block, size) case GGML_TYPE_SPLITQ_##NAME:
#define GGML_SPLITQ_ITEM(NAME, name, id, block, size) GGML_TYPE_SPLITQ_##NAME,

// LLAMA_FTYPE_MOSTLY_SPLITQ_SQ4 and so on, for files with mostly such tensors
#define LLAMA_SPLITQ_FTYPE_ENUM(NAME, name, id, block, size)   LLAMA_FTYPE_MOSTLY_SPLITQ_##NAME = id,
#define LLAMA_SPLITQ_FTYPE_CASE(NAME, name, id, block, size)   case LLAMA_FTYPE_MOSTLY_SPLITQ_##NAME:
#define LLAMA_SPLITQ_FTYPE_NAME(NAME, name_, id, block, size)  \
    case LLAMA_FTYPE_MOSTLY_SPLITQ_##NAME: name = LLAMA_FTYPE_PREFIX #NAME " - " size; break;
#define LLAMA_SPLITQ_FTYPE_OPTION(NAME, name, id, block, size) { #NAME, LLAMA_FTYPE_MOSTLY_SPLITQ_##NAME, " " size },
