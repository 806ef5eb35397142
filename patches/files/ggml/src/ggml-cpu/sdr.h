// SPDX-License-Identifier: MIT
// Dot products of sdr4 weights, or of an sdr4 K cache: integers, and one shift per group of 16.
//
// With q8_0, 8 bits for activations, which is what runs by default. The order of additions is the one of splitq.h, so
// that every instruction set gives the same float, bit for bit; the four-weight sums are shifted before they are
// multiplied in.
//
// With razored activations, 4 bits. As QRazor has it: a token is scaled to 16-bit integers by its largest magnitude, each
// group of 16 keeps sign and three bits below its leading one, rounded to nearest even and cut to -8 .. 7, and the
// products of the 4-bit integers are added and then shifted by the sum of both shifts. Same order of additions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// 32 activations: integer i of group g stands for q[16*g + i] << shift[g], in units of the token's scale.
typedef struct {
    uint8_t shift[2];  // 0 .. 12
    int8_t  q[32];     // -8 .. 7
} sdr_block_a4;

// The signature is ggml_vec_dot_t: n weights; nrc must be 1, the strides bs, bx and by are not used.
void splitq_vec_dot_sdr4_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

// Razors one token of n activations, a multiple of 32, and returns its scale.
float sdr_razor_activations(const float * x, sdr_block_a4 * y, int n);
float sdr_vec_dot_sdr4_a4(int n, const void * vx, const sdr_block_a4 * y, float scale);

#ifdef __cplusplus
}
#endif
