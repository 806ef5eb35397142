// SPDX-License-Identifier: MIT
// sdr4, significant data razoring after QRazor (arXiv 2501.13331): a code is a 4-bit integer, a group of 16 shifts it.
// docs/format.md of gguf-splitq draws the same bytes; gguf_splitq/types/sdr.py is the NumPy twin.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SDR_QK 32  // weights of a block
#define SDR_G  16  // weights of a group, half a block

// weight i = step(d) * (code i << shift of its group)
typedef struct {
    uint8_t qs[16];  // two's complement 4-bit codes: byte j holds codes j (low nibble) and j + 16 (high nibble)
    uint8_t d;       // step and shifts
} splitq_block_sdr4;

#ifndef __cplusplus
_Static_assert(sizeof(splitq_block_sdr4) == 17, "sdr4 block size");
#endif

// The byte d: 85 steps, the same negated, then 43 steps with the second group shifted by 1, and with the first.
#define SDR_FINE        85
#define SDR_COARSE      43
#define SDR_SHIFT_1ST  213  // d from here on shifts the first group
#define SDR_SHIFT_2ND  170  // d from here on, and below SDR_SHIFT_1ST, shifts the second

#define SDR_STEP_MIN 0x1p-15f             // step of d = 0
#define SDR_MAX      (7*4*0x1p21f*0x1p-17f) // the largest |weight|: code 7 at the largest step

// What a unit of a code stands for in each group: the step, twice that where the group is shifted.
#define SDR_UNIT(u, a, b)            { (u)*(a), (u)*(b) }
#define SDR_OCTAVE_4(u, a, b)        SDR_UNIT(1.00f*(u), a, b), SDR_UNIT(1.25f*(u), a, b), SDR_UNIT(1.50f*(u), a, b), SDR_UNIT(1.75f*(u), a, b)
#define SDR_OCTAVE_2(u, a, b)        SDR_UNIT(1.00f*(u), a, b), SDR_UNIT(1.50f*(u), a, b)
#define SDR_TIMES_1(octave, u, a, b) octave(u, a, b), octave((u)*0x1p1f, a, b), octave((u)*0x1p2f, a, b), octave((u)*0x1p3f, a, b), \
                                     octave((u)*0x1p4f, a, b), octave((u)*0x1p5f, a, b), octave((u)*0x1p6f, a, b)
#define SDR_RANGE(octave, u, a, b)   SDR_TIMES_1(octave, u, a, b), SDR_TIMES_1(octave, (u)*0x1p7f, a, b), \
                                     SDR_TIMES_1(octave, (u)*0x1p14f, a, b), SDR_UNIT((u)*0x1p21f, a, b)
static const float sdr_unit[256][2] = {
    SDR_RANGE(SDR_OCTAVE_4, SDR_STEP_MIN, 1, 1), SDR_RANGE(SDR_OCTAVE_4, -SDR_STEP_MIN, 1, 1),
    SDR_RANGE(SDR_OCTAVE_2, SDR_STEP_MIN, 1, 2), SDR_RANGE(SDR_OCTAVE_2,  SDR_STEP_MIN, 2, 1),
};
#undef SDR_UNIT
#undef SDR_OCTAVE_4
#undef SDR_OCTAVE_2
#undef SDR_TIMES_1
#undef SDR_RANGE

static const int8_t splitq_levels_sdr4[16] = { 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1 };

GGML_API void splitq_quantize_row_sdr4  (const float * x, void * y, int64_t k);
GGML_API void splitq_dequantize_row_sdr4(const void * x, float * y, int64_t k);

// sdr4's part of ggml_quantize_chunk. There is nothing to validate: every byte is a code or a step.
GGML_API void sdr_quantize_chunk(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
