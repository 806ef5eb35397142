// SPDX-License-Identifier: MIT
#include "ggml-columns.h"

#include "ggml-impl.h"
#include "ggml-splitq.h"

#include <string.h>

_Static_assert(sizeof(splitq_block_cq4) == 16, "cq4 block size");
_Static_assert(sizeof(splitq_block_cq3) == 12, "cq3 block size");
_Static_assert(sizeof(splitq_block_cq2) ==  8, "cq2 block size");
_Static_assert(sizeof(splitq_block_sq3c) == 13, "sq3c block size");
_Static_assert(sizeof(splitq_block_sq2c) ==  9, "sq2c block size");

int columns_bits(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_SPLITQ_SQ4WC:
        case GGML_TYPE_SPLITQ_CQ4:  return 4;
        case GGML_TYPE_SPLITQ_SQ3WO:
        case GGML_TYPE_SPLITQ_SQ3WC:
        case GGML_TYPE_SPLITQ_SQ3C:
        case GGML_TYPE_SPLITQ_CQ3:  return 3;
        case GGML_TYPE_SPLITQ_SQ2WO:
        case GGML_TYPE_SPLITQ_SQ2WC:
        case GGML_TYPE_SPLITQ_SQ2C:
        case GGML_TYPE_SPLITQ_CQ2:  return 2;
        default:                    return 0;
    }
}

bool columns_has_codebooks(enum ggml_type type) {
    return type == GGML_TYPE_SPLITQ_CQ4 || type == GGML_TYPE_SPLITQ_CQ3 || type == GGML_TYPE_SPLITQ_CQ2;
}

static bool is_open(enum ggml_type type) {
    return type == GGML_TYPE_SPLITQ_SQ3WO || type == GGML_TYPE_SPLITQ_SQ2WO;
}

bool columns_has_windows(enum ggml_type type) {
    return type == GGML_TYPE_SPLITQ_SQ4WC || type == GGML_TYPE_SPLITQ_SQ3WC || type == GGML_TYPE_SPLITQ_SQ2WC || is_open(type);
}

bool ggml_splitq_has_columns(enum ggml_type type) {
    return columns_bits(type) != 0;
}

// The next section, of `size` bytes, or NULL if the matrix has none.
static const void * section(const char * data, size_t * at, bool present, size_t size) {
    const void * start = present ? data + *at : NULL;
    *at += present ? GGML_PAD(size, 32) : 0;
    return start;
}

struct columns_side columns_side_at(enum ggml_type type, const void * data) {
    uint32_t header[8];
    memcpy(header, data, sizeof(header));
    struct columns_side s = { .rows = header[1], .columns = header[2], .wide = header[3], .outliers = header[4], .base = header[5], .step = header[6], .size = sizeof(header) };
    const int bits = columns_bits(type);
    const bool codebooks = columns_has_codebooks(type);
    const size_t rows = s.rows, columns = s.columns, wide = s.wide;
    s.order  = section(data, &s.size, wide > 0, 2*columns);
    s.row    = section(data, &s.size, codebooks, 2*rows);
    s.scale  = section(data, &s.size, true, 2*columns);
    s.levels = section(data, &s.size, codebooks, COLUMNS_QK*wide*16 + ((columns - COLUMNS_QK*wide) << bits));
    s.extra  = section(data, &s.size, wide > 0, (rows + 15)/16*wide*columns_more_bits(bits, codebooks)*64);
    s.start  = section(data, &s.size, s.outliers > 0, 4*(rows + 1));
    s.column = section(data, &s.size, s.outliers > 0, 2*(size_t) s.outliers);
    s.value  = section(data, &s.size, s.outliers > 0, 2*(size_t) s.outliers);
    return s;
}

static bool all_finite(const ggml_half * h, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if ((h[i] & 0x7c00) == 0x7c00) { return false; }
    }
    return true;
}

static bool is_permutation(const uint16_t * order, uint32_t n) {
    uint8_t seen[65536/8] = { 0 };
    for (uint32_t i = 0; i < n; ++i) {
        if (order[i] >= n || seen[order[i]/8] >> order[i] % 8 & 1) { return false; }
        seen[order[i]/8] |= 1 << order[i] % 8;
    }
    return true;
}

// Whether these can be the base and the step of block scales: 0, but for open types.
static bool has_grid(enum ggml_type type, uint32_t base, uint32_t step) {
    if (!is_open(type)) {
        return !base && !step;
    }
    const uint32_t last = (2u << columns_bits(type)) - 1;
    return (step == 1 || step == 2 || step == 4) && base >= 1 && base <= 127 - step*last;
}

const char * ggml_splitq_check_columns(enum ggml_type type, int64_t columns, int64_t rows, const void * data, size_t size) {
    uint32_t header[8];
    if (size < sizeof(header)) {
        return "is too small";
    }
    if ((uintptr_t) data % 4) {
        return "is not aligned";
    }
    memcpy(header, data, sizeof(header));
    if (header[0] != COLUMNS_MAGIC || !has_grid(type, header[5], header[6]) || header[7]) {
        return "does not begin with the header of a side tensor";
    }
    if (header[1] != rows || header[2] != columns) {
        return "has a header that is not of the weight's shape";
    }
    if (header[3] > columns/COLUMNS_QK || (header[3] && (columns_bits(type) == 4 || columns_has_windows(type)))) {
        return "has more wide blocks than the weight can have";
    }
    if (header[4] && !columns_has_codebooks(type)) {
        return "has outliers, which the weight's type has not";
    }
    if ((header[3] || header[4]) && columns > 65536) {
        return "numbers columns by 16 bits, which the weight has too many for";
    }
    const struct columns_side s = columns_side_at(type, data);
    if (s.size > size) {
        return "is too small";
    }
    if (s.order && !is_permutation(s.order, s.columns)) {
        return "has an order of columns that is not a permutation";
    }
    if ((s.row && !all_finite(s.row, s.rows)) || !all_finite(s.scale, s.columns) || !all_finite(s.value, s.outliers)) {
        return "has a scale or an outlier that is not a finite number";
    }
    if (s.outliers) {
        if (s.start[0] != 0 || s.start[rows] != s.outliers) {
            return "has rows that do not share out its outliers";
        }
        for (uint32_t r = 0; r < s.rows; ++r) {
            if (s.start[r] > s.start[r + 1]) { return "has rows that do not share out its outliers"; }
        }
        for (uint32_t i = 0; i < s.outliers; ++i) {
            if (s.column[i] >= s.columns) { return "has an outlier in a column that does not exist"; }
        }
    }
    return NULL;
}

// The same for a type of windows; size: bytes of a block.
static void decode_windows(enum ggml_type type, const struct columns_side * side, const uint8_t * panel, int lanes, int lane, size_t size, float * y) {
    for (uint32_t b = 0; b < side->columns/COLUMNS_QK; ++b, panel += lanes*size, y += COLUMNS_QK) {
        uint8_t block[sizeof(splitq_block_sq4wc)];
        size_t at = 0;
        for (; at + 8 <= size; at += 8) { memcpy(block + at, panel + lanes*at + 8*splitq_window_lane(lane, lanes), 8); }
        for (; at + 4 <= size; at += 4) { memcpy(block + at, panel + lanes*at + 4*lane, 4); }
        block[at] = panel[lanes*at + lane];
        switch (type) {
            case GGML_TYPE_SPLITQ_SQ4WC: splitq_dequantize_row_sq4w(block, y, COLUMNS_QK); break;
            case GGML_TYPE_SPLITQ_SQ3WC: splitq_dequantize_row_sq3w(block, y, COLUMNS_QK); break;
            case GGML_TYPE_SPLITQ_SQ2WC: splitq_dequantize_row_sq2w(block, y, COLUMNS_QK); break;
            default: splitq_dequantize_open(type, block, y, COLUMNS_QK, (int) side->base, (int) side->step); break;
        }
        for (int c = 0; c < COLUMNS_QK; ++c) { y[c] *= GGML_FP16_TO_FP32(side->scale[COLUMNS_QK*b + c]); }
    }
}

void columns_decode_row(enum ggml_type type, const struct columns_side * side, const void * x, int lanes, uint32_t r, float * y) {
    static const int8_t * const fixed[] = { splitq_levels_sq2, splitq_levels_sq3, splitq_levels_sq4 };
    const int  bits = columns_bits(type), size = (int) ggml_row_size(type, COLUMNS_QK), lane = r % lanes;
    const bool codebooks = columns_has_codebooks(type);
    if (columns_has_windows(type)) {
        decode_windows(type, side, x, lanes, lane, size, y);
        return;
    }
    const uint8_t * block = x;
    for (uint32_t b = 0; b < side->columns/COLUMNS_QK; ++b, block += lanes*size) {
        const int more = b < side->wide ? columns_more_bits(bits, codebooks) : 0, all = bits + more;
        uint8_t q[16], e[16] = { 0 };
        for (int w = 0; w < bits; ++w) { memcpy(q + 4*w, block + 4*(lanes*w + lane), 4); }
        for (int w = 0; w < more; ++w) { memcpy(e + 4*w, columns_extra(side, more, r, b) + 64*w, 4); }
        const float factor = codebooks ? GGML_FP16_TO_FP32(side->row[r]) : splitq_scale[block[lanes*(size - 1) + lane]];
        for (int c = 0; c < COLUMNS_QK; ++c) {
            const int k = c % 4, w = c/16, i = c/4 % 4;
            int code;
            if (bits == 4) {
                code = q[c/8*4 + k] >> c/4 % 2*4 & 15;
            } else {
                code = q[4*w + k] >> 2*i & 3;
                if (bits == 3) { code |= (q[8 + k] >> (4*w + i) & 1) << 2; }
                if (more == 1) { code |= (e[k] >> (4*w + i) & 1) << bits; }
                if (more == 2) { code |= (e[4*w + k] >> 2*i & 3) << 2; }
            }
            const int8_t * levels = codebooks ? columns_levels(side, bits, b) + ((size_t) c << all) : fixed[all - 2];
            const uint32_t column = COLUMNS_QK*b + c;
            y[side->order ? side->order[column] : column] = factor*GGML_FP16_TO_FP32(side->scale[column])*levels[code];
        }
    }
    for (uint32_t i = side->outliers ? side->start[r] : 0; side->outliers && i < side->start[r + 1]; ++i) {
        const uint32_t column = side->column[i];
        y[side->order ? side->order[column] : column] += GGML_FP16_TO_FP32(side->value[i]);
    }
}
