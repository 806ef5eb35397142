// SPDX-License-Identifier: MIT
// Reference encoder and decoder of sq4w, sq3w and sq2w.

#include "ggml-windows.h"
#include "ggml-impl.h"

#include <assert.h>
#include <string.h>

#define SPLITQ_WINDOWS(name, rms, ...)                                                      \
    void splitq_dequantize_row_##name(const void * x, float * y, int64_t k) {               \
        assert(k % SPLITQ_QK == 0);                                                         \
        const splitq_block_##name * b = x;                                                  \
        for (int64_t ib = 0; ib < k/SPLITQ_QK; ++ib, ++b, y += SPLITQ_QK) {                 \
            const float d = splitq_scale[b->d];                                             \
            uint64_t windows[4];                                                            \
            splitq_windows_of_##name(b, windows);                                           \
            for (int c = 0; c < SPLITQ_QK; ++c) {                                           \
                y[c] = d*splitq_windows_##name[windows[c/8] >> c%8*8 & 255];                \
            }                                                                               \
        }                                                                                   \
    }
#include "ggml-windows-tables.h"
#undef SPLITQ_WINDOWS
