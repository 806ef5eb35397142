// SPDX-License-Identifier: MIT
// Dot products of the SplitQuantV2 family with q8_0 activations.
//
// All of them add in one order, so that every instruction set gives the same float, bit for bit. Sixteen float
// sums run along the row: block b of 32 weights adds to sums 8*(b%2) .. 8*(b%2) + 7, and of these sum l takes
// weights 4*l .. 4*l + 3, whose integer products are added exactly and multiplied in by one fused
// multiply-add. Sums 8..15 are then added to 0..7, and these eight in halves: 4 apart, 2 apart, 1 apart.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// The signature is ggml_vec_dot_t: n weights; nrc must be 1, the strides bs, bx and by are not used.
void splitq_vec_dot_sq4_q8_0 (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq3_q8_0 (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq2_q8_0 (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq6w_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq5w_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq4w_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq3w_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq2w_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void splitq_vec_dot_sq4x_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

#ifdef __cplusplus
}
#endif
