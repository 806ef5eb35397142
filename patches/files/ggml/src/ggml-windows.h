// SPDX-License-Identifier: MIT
// Window codes, sq6w to sq2w: the level of a weight is looked up by 6 or 7 bits, of which as many as the name says are its own
// and the rest its neighbours' in a chain that closes on itself. sq4w, sq3w and sq2w have as many bytes as sq4, sq3 and sq2.
// All have their scale byte.
// docs/format.md of gguf-splitq draws the same bytes; gguf_splitq/types/windows.py is the NumPy twin.
#pragma once

#include "ggml-splitq.h"

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// The index of the level of column c, 6 bits or, of sq6w and sq5w, 7. q and sq6w's qh are read as 64-bit words and ror turns one
// right; byte k of a word is its bits 8k..8k+7.
//   sq6w, c = 16 h + 8 i + k (i 0..1):  byte k of ror(q[h], 4 i), low 4 bits; two bits of byte k of ror(qh, 4 h + 2 i) above
//                                       them; bit 4 of the first byte above these
//   sq5w, c = 16 h + 8 i + k (i 0..1):  byte k of ror(q[h], 4 i), low 4 bits; bit 4 k + 2 h + i of qh above them; bits 5 and 4
//                                       of the byte above that
//   sq4w, c = 16 h + 8 i + k (i 0..1):  byte k of ror(q[h], 4 i), low 6 bits
//   sq2w, c = 8 i + k (i 0..3):         byte k of ror(q, 2 i), low 6 bits
//   sq3w, c = 8 i + k (i 0..3):         byte k of ror(q, 2 i), low 4 bits, and bits p, p + 1 (mod 32) of qh, p = 4 k + i, above them

typedef struct {
    uint8_t q[16];   // low four bits of two chains of 16 codes
    uint8_t qh[8];   // high two bits
    uint8_t d;       // scale, see ggml-splitq.h
} splitq_block_sq6w;

typedef struct {
    uint8_t q[16];   // low four bits of two chains of 16 codes
    uint8_t qh[4];   // high bits
    uint8_t d;
} splitq_block_sq5w;

typedef struct {
    uint8_t q[16];   // two chains of 16 codes
    uint8_t d;
} splitq_block_sq4w;

typedef struct {
    uint8_t q[8];    // low two bits of a chain of 32 codes
    uint8_t qh[4];   // high bits
    uint8_t d;
} splitq_block_sq3w;

typedef struct {
    uint8_t q[8];    // a chain of 32 codes
    uint8_t d;
} splitq_block_sq2w;

// The same bytes with open chains: windows at the end of a chain have bits of d's state where the closed ones have the first of
// q and qh. See splitq_open_scale for the rest of d.
typedef splitq_block_sq3w splitq_block_sq3wo; // bit 0 of d follows the last of qh, bits 1 and 2 follow that of q
typedef splitq_block_sq2w splitq_block_sq2wo; // bits 0 to 3 follow the last of q

#ifndef __cplusplus
_Static_assert(sizeof(splitq_block_sq6w) == 25, "sq6w block size");
_Static_assert(sizeof(splitq_block_sq5w) == 21, "sq5w block size");
_Static_assert(sizeof(splitq_block_sq4w) == 17, "sq4w block size");
_Static_assert(sizeof(splitq_block_sq3w) == 13, "sq3w block size");
_Static_assert(sizeof(splitq_block_sq2w) ==  9, "sq2w block size");
#endif

#define SPLITQ_INDICES(bits) ((bits) > 4 ? 128 : 64) // that there are, by the bits of a code

// splitq_windows_sq4w[64] and so on
#define SPLITQ_WINDOWS(name, bits, rms, ...) static const int8_t splitq_windows_##name[64] = { __VA_ARGS__ };
#include "ggml-windows-tables.h"
#undef SPLITQ_WINDOWS
#define splitq_windows_sq3wo splitq_windows_sq3w
#define splitq_windows_sq2wo splitq_windows_sq2w

// Words of 64 bits are little-endian in the file, and so is every machine that this runs on.
static inline uint64_t splitq_ror(const uint8_t * q, int bits) {
    uint64_t word;
    memcpy(&word, q, sizeof(word));
    return bits ? word >> bits | word << (64 - bits) : word;
}

// The word of an open chain, to the right, `state` behind it.
static inline uint64_t splitq_shr(const uint8_t * q, uint64_t state, int bits) {
    uint64_t word;
    memcpy(&word, q, sizeof(word));
    return bits ? word >> bits | state << (64 - bits) : word;
}

// The level of an index: with 7 bits the highest turns the other level of a pair.
static inline int splitq_level_at(const int8_t * levels, int index) {
    return index & 64 ? -1 - levels[(index & 63) ^ 1] : levels[index];
}

// The indices of a block's 32 levels: byte k of windows[i] is that of column 8*i + k.
static inline void splitq_windows_of_sq6w(const splitq_block_sq6w * b, uint64_t windows[4]) {
    for (int i = 0; i < 4; ++i) {
        const uint64_t q = splitq_ror(b->q + i/2*8, i%2*4), high = splitq_ror(b->qh, 2*i);
        windows[i] = (q & 0x0f0f0f0f0f0f0f0f) | (high & 0x0303030303030303) << 4 | (q & 0x1010101010101010) << 2;
    }
}

// Byte k: bits 4*k .. 4*k + 3 of a block's 32.
static inline uint64_t splitq_nibbles(const uint8_t * b) {
    uint64_t qh = b[0] | b[1] << 8 | b[2] << 16 | (uint64_t) b[3] << 24;
    qh = (qh | qh << 16) & 0x0000ffff0000ffff;
    qh = (qh | qh <<  8) & 0x00ff00ff00ff00ff;
    return (qh | qh <<  4) & 0x0f0f0f0f0f0f0f0f;
}

// The same and, above them, the next four.
static inline uint64_t splitq_spread(const uint8_t * b) {
    const uint64_t qh = splitq_nibbles(b);
    return qh | qh >> 4 | qh << 60;
}

static inline void splitq_windows_of_sq5w(const splitq_block_sq5w * b, uint64_t windows[4]) {
    const uint64_t qh = splitq_spread(b->qh);
    for (int i = 0; i < 4; ++i) {
        const uint64_t q = splitq_ror(b->q + i/2*8, i%2*4);
        windows[i] = (q & 0x2f2f2f2f2f2f2f2f) | (qh << (4 - i) & 0x1010101010101010) | (q & 0x1010101010101010) << 2;
    }
}

static inline void splitq_windows_of_sq4w(const splitq_block_sq4w * b, uint64_t windows[4]) {
    for (int i = 0; i < 4; ++i) { windows[i] = splitq_ror(b->q + i/2*8, i%2*4) & 0x3f3f3f3f3f3f3f3f; }
}

static inline void splitq_windows_of_sq3w(const splitq_block_sq3w * b, uint64_t windows[4]) {
    const uint64_t qh = splitq_spread(b->qh);
    for (int i = 0; i < 4; ++i) {
        windows[i] = (splitq_ror(b->q, 2*i) & 0x0f0f0f0f0f0f0f0f) | (qh << (4 - i) & 0x3030303030303030);
    }
}

static inline void splitq_windows_of_sq2w(const splitq_block_sq2w * b, uint64_t windows[4]) {
    for (int i = 0; i < 4; ++i) { windows[i] = splitq_ror(b->q, 2*i) & 0x3f3f3f3f3f3f3f3f; }
}

static inline void splitq_windows_of_sq3wo(const splitq_block_sq3wo * b, uint64_t windows[4]) {
    uint64_t qh = splitq_nibbles(b->qh);
    qh |= qh >> 4 | (uint64_t) b->d << 60;
    for (int i = 0; i < 4; ++i) {
        windows[i] = (splitq_shr(b->q, b->d >> 1, 2*i) & 0x0f0f0f0f0f0f0f0f) | (qh << (4 - i) & 0x3030303030303030);
    }
}

static inline void splitq_windows_of_sq2wo(const splitq_block_sq2wo * b, uint64_t windows[4]) {
    for (int i = 0; i < 4; ++i) { windows[i] = splitq_shr(b->q, b->d, 2*i) & 0x3f3f3f3f3f3f3f3f; }
}

// The index of the scale of an open type: `base` and `step` are its matrix' own.
static inline int splitq_open_scale(int d, int bits, int base, int step) {
    return base + step*((d & 127) >> (6 - bits)) + (d & 128);
}

// Of `lanes` interleaved rows: in whose place row r has its words of 64 bits. They fill two vectors, with rows 0, 1, 4, 5, 8 ..
// and with rows 2, 3, 6, 7, 10 ..
static inline int splitq_window_lane(int r, int lanes) {
    return lanes == 1 ? 0 : r/2%2*(lanes/2) + r/4*2 + r%2;
}

GGML_API void splitq_quantize_row_sq6w(const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq5w(const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq4w(const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq3w(const float * x, void * y, int64_t k);
GGML_API void splitq_quantize_row_sq2w(const float * x, void * y, int64_t k);

GGML_API void splitq_dequantize_row_sq6w(const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq5w(const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq4w(const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq3w(const void * x, float * y, int64_t k);
GGML_API void splitq_dequantize_row_sq2w(const void * x, float * y, int64_t k);

// The same for rows of GGML_TYPE_SPLITQ_SQ3WO and SQ2WO in units of their columns' scales.
GGML_API void splitq_quantize_open(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix, int base, int step);
GGML_API void splitq_dequantize_open(enum ggml_type type, const void * x, float * y, int64_t k, int base, int step);

// Their part of splitq_quantize_chunk: rows, with the importance of their columns or NULL.
void splitq_windows_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
