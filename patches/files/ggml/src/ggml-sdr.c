// SPDX-License-Identifier: MIT
// Reference encoder and decoder of sdr4. Every operation is a single float32 operation in a fixed order (the file is
// built with -ffp-contract=off), so that NumPy, doing the same operations on whole arrays, gives the same bytes.

#include "ggml-sdr.h"
#include "ggml-splitq-encode.h"

#include <assert.h>
#include <math.h>
#include <string.h>

// Steps tried of each kind, from the largest one of which the largest |weight| is at least 8 units.
#define SDR_TRIED 3

// In a cache, the part of a block's error that lies along the block itself counts SDR_ALONG times more: it makes attention
// scores and averages of values too large or too small together, where the rest averages out.
#define SDR_ALONG 4.0f

// Index of the largest step not above x (x >= 0) where an octave has 2^bits, 0 below all: a step's exponent and the
// upper bits of its significand are its index.
static SPLITQ_INLINE int step_below(float x, int bits) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    const int index = (int) (u >> (23 - bits)) - ((127 - 15) << bits);
    return index > 0 ? index : 0;
}

// Codes of a block for byte d, and their squared error, weighted by `weight`; the error along the block counts `along` times
// in addition.
static SPLITQ_INLINE float round_sdr_block(const float * w, const float * weight, float along, int d, float * codes) {
    float error[SDR_QK], product[SDR_QK];
    for (int g = 0; g < 2; ++g) {
        const float step = sdr_unit[d][g];
        const float inv  = 1.0f/step;
        for (int j = g*SDR_G; j < (g + 1)*SDR_G; ++j) {
            float q = rintf(w[j]*inv);
            q = q < -8.0f ? -8.0f : q;
            q = q >  7.0f ?  7.0f : q;
            const float r = w[j] - step*q;
            codes[j] = q;
            error[j]   = weight[j]*r*r;
            product[j] = w[j]*r;
        }
    }
    const float e = tree_sum(error, SDR_QK);
    if (along == 0) {
        return e;
    }
    const float b = tree_sum(product, SDR_QK);
    return e + b*b*along;
}

static SPLITQ_INLINE void encode_sdr_block(const float * x, const float * weight, bool cache, splitq_block_sdr4 * y) {
    float w[SDR_QK], error[SDR_QK], codes[SDR_QK], best_codes[SDR_QK] = { 0 };
    float largest[2] = { 0, 0 };
    for (int j = 0; j < SDR_QK; ++j) {
        w[j] = clamped(x[j], SDR_MAX);
        const float a = fabsf(w[j]);
        largest[j/SDR_G] = a > largest[j/SDR_G] ? a : largest[j/SDR_G];
        error[j] = weight[j]*w[j]*w[j];
    }
    float least = tree_sum(error, SDR_QK); // of all codes 0
    y->d = 0;
    const float along = cache ? SDR_ALONG/(least + 1e-30f) : 0;
    least = cache ? least*(1 + SDR_ALONG) : least;

    const float a       = largest[0] > largest[1] ? largest[0]    : largest[1];
    const int   shifted = largest[0] > largest[1] ? SDR_SHIFT_1ST : SDR_SHIFT_2ND;
    const int   fine = step_below(a/8, 2), coarse = step_below(a/16, 1);
    for (int up = 0; up < SDR_TRIED; ++up) {
        const int f = fine   + up < SDR_FINE   - 1 ? fine   + up : SDR_FINE   - 1;
        const int c = coarse + up < SDR_COARSE - 1 ? coarse + up : SDR_COARSE - 1;
        const int tried[3] = { f, f + SDR_FINE, c + shifted };
        for (int i = 0; i < 3; ++i) {
            const float e = round_sdr_block(w, weight, along, tried[i], codes);
            if (e < least) {
                least = e;
                y->d  = tried[i];
                memcpy(best_codes, codes, sizeof(codes));
            }
        }
    }
    for (int j = 0; j < SDR_G; ++j) {
        y->qs[j] = ((int) best_codes[j] & 15) | ((int) best_codes[j + SDR_G] & 15) << 4;
    }
}

SPLITQ_CLONES static void encode_sdr_row(const float * x, splitq_block_sdr4 * y, int64_t k, const float * imatrix) {
    for (int64_t i = 0; i < k; i += SDR_QK) {
        encode_sdr_block(x + i, block_weight(imatrix ? imatrix + i : NULL), false, y + i/SDR_QK);
    }
}

SPLITQ_CLONES void splitq_quantize_row_sdr4(const float * x, void * y, int64_t k) {
    assert(k % SDR_QK == 0);
    for (int64_t i = 0; i < k; i += SDR_QK) {
        encode_sdr_block(x + i, unweighted, true, (splitq_block_sdr4 *) y + i/SDR_QK);
    }
}

SPLITQ_CLONES void splitq_dequantize_row_sdr4(const void * x, float * y, int64_t k) {
    assert(k % SDR_QK == 0);
    for (const splitq_block_sdr4 * b = x; k > 0; ++b, y += SDR_QK, k -= SDR_QK) {
        const splitq_block_sdr4 own = *b; // so that y cannot be seen to change it
        for (int j = 0; j < SDR_G; ++j) {
            y[j]         = sdr_unit[own.d][0] * ((int32_t) ((uint32_t) own.qs[j] << 28) >> 28);
        }
        for (int j = 0; j < SDR_G; ++j) {
            y[j + SDR_G] = sdr_unit[own.d][1] * ((int32_t) ((uint32_t) own.qs[j] << 24) >> 28);
        }
    }
}

void sdr_quantize_chunk(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % SDR_QK == 0);
    const int64_t row_blocks = n_per_row/SDR_QK;
    for (int64_t row = 0; row < nrows; ++row) {
        encode_sdr_row(src + row*n_per_row, (splitq_block_sdr4 *) dst + row*row_blocks, n_per_row, imatrix);
    }
}
