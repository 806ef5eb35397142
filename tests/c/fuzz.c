// SPDX-License-Identifier: MIT
// Hostile tensors against what llama.cpp's loader asks of them, for a build with sanitizers. What a check accepts is
// decoded, in memory that ends where the tensor ends; what it refuses has a reason.
//
//   fuzz ROUNDS SEED     stdout: how many side tensors came to which answer ("accepted" or the reason), a line each
#include "ggml-columns.c"
#include "ggml-splitq.c"
#include "ggml-sdr.c"
#include "ggml-windows.c"

#include <stdio.h>
#include <stdlib.h>

// What the included files take from ggml.c.
void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type) { // only for splitq_errors, not called here
    (void) type;
    return NULL;
}

size_t ggml_row_size(enum ggml_type type, int64_t n) { // of the types with side tensors
    return n/COLUMNS_QK*(4*columns_bits(type) + !columns_has_codebooks(type));
}

void quantize_row_q8_0(const float * x, void * y, int64_t n) { // not called here
    (void) x; (void) y; (void) n;
}

static uint64_t state;

static uint32_t below(uint32_t n) { // xorshift64*
    state ^= state >> 12; state ^= state << 25; state ^= state >> 27;
    return (uint32_t) (((state*0x2545f4914f6cdd1dull) >> 32)*n >> 32);
}

static void fill(void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) { ((uint8_t *) data)[i] = below(256); }
}

static void * allocated(size_t size) { // exactly, so that a sanitizer sees what lies beyond
    void * data = malloc(size ? size : 1);
    if (!data) { abort(); }
    return data;
}

static uint32_t extreme(void) {
    static const uint32_t values[] = { 0, 1, 2, 31, 32, 255, 256, 65535, 65536, 1u << 27, 1u << 31, UINT32_MAX - 1, UINT32_MAX };
    return values[below(sizeof(values)/sizeof(*values))];
}

static void finite_halves(ggml_half * h, size_t n) {
    for (size_t i = 0; i < n; ++i) { h[i] = below(0x7c00) | below(2) << 15; }
}

// A sound side tensor, `*size` bytes.
static void * side_tensor(enum ggml_type type, uint32_t rows, uint32_t columns, size_t * size) {
    const bool codebooks = columns_has_codebooks(type);
    uint32_t header[8] = { COLUMNS_MAGIC, rows, columns };
    const bool numbered = columns <= 65536 || below(2); // beyond that neither is allowed
    header[3] = columns_bits(type) < 4 && numbered ? below(columns/COLUMNS_QK + 1) : 0;
    header[4] = codebooks && numbered && below(2) ? below(3*rows) : 0;
    if (type == GGML_TYPE_SPLITQ_SQ3WO || type == GGML_TYPE_SPLITQ_SQ2WO) {
        header[5] = 1 + below(67);
        header[6] = 1 << below(3);
    }
    *size = columns_side_at(type, header).size;
    char * data = allocated(*size);
    fill(data, *size);
    memcpy(data, header, sizeof(header));
    const struct columns_side s = columns_side_at(type, data);
    for (uint32_t i = 0; s.order && i < columns; ++i) { // a shuffle from the inside out
        const uint32_t j = below(i + 1);
        uint16_t * order = (uint16_t *) s.order;
        order[i] = order[j];
        order[j] = i;
    }
    if (s.row) { finite_halves((ggml_half *) s.row, rows); }
    finite_halves((ggml_half *) s.scale, columns);
    if (s.outliers) {
        uint32_t * start = (uint32_t *) s.start;
        memset(start, 0, 4*(rows + 1));
        for (uint32_t i = 0; i < s.outliers; ++i) { start[1 + below(rows)]++; }
        for (uint32_t r = 0; r < rows; ++r) { start[r + 1] += start[r]; }
        for (uint32_t i = 0; i < s.outliers; ++i) { ((uint16_t *) s.column)[i] = below(columns); }
        finite_halves((ggml_half *) s.value, s.outliers);
    }
    return data;
}

static void damage(void * data, size_t * size) {
    uint8_t * bytes = data;
    const size_t head = *size < 256 ? *size : 256;
    switch (below(6)) {
        case 0: break;
        case 1: for (int n = 1 + below(4); n; --n) { bytes[below(*size)] ^= 1 << below(8); } break;
        case 2: { const uint32_t value = extreme(); memcpy(bytes + 4*below(8), &value, 4); } break;
        case 3: { const uint32_t value = extreme(); memcpy(bytes + 4*below(*size/4), &value, 4); } break;
        case 4: fill(bytes + below(*size), 1); fill(bytes + below(head), 1); break;
        case 5: *size = below(2) ? *size - 1 - below(32) : below(*size); break;
    }
}

static struct { const char * answer; long count; } answers[32];

static void count(const char * answer) {
    int i = 0;
    while (answers[i].answer && strcmp(answers[i].answer, answer)) { ++i; }
    answers[i].answer = answer;
    answers[i].count++;
}

static void side_tensors(void) {
    static const enum ggml_type types[] = { GGML_SPLITQ_COLUMN_TYPES(GGML_SPLITQ_ITEM) };
    const enum ggml_type type = types[below(sizeof(types)/sizeof(*types))];
    const bool many = below(500) == 0; // columns, more than 16 bits can number
    const uint32_t rows = 1 + below(many ? 2 : 40), columns = COLUMNS_QK*(many ? 2047 + below(4) : 1 + below(8));
    size_t size;
    void * sound = side_tensor(type, rows, columns, &size);
    damage(sound, &size);
    const int shift = below(16) ? 0 : 1 + below(3);
    char * memory = allocated(size + shift), * data = memory + shift;
    memcpy(data, sound, size);
    const char * wrong = ggml_splitq_check_columns(type, columns, rows, data, size);
    count(wrong ? wrong : "accepted");
    if (!wrong) {
        const struct columns_side side = columns_side_at(type, data);
        const size_t row_size = ggml_row_size(type, columns);
        char  * codes = allocated(rows*row_size);
        float * y = allocated(columns*sizeof(float));
        fill(codes, rows*row_size);
        for (uint32_t r = 0; r < rows; ++r) {
            memset(y, 0xff, columns*sizeof(float));
            columns_decode_row(type, &side, codes + r*row_size, 1, r, y);
            for (uint32_t i = 0; i < columns; ++i) { // NaN before
                if (!isfinite(y[i])) { fprintf(stderr, "a weight that was not decoded\n"); abort(); }
            }
        }
        free(y);
        free(codes);
    }
    free(memory);
    free(sound);
}

static void blocks(void) {
    enum { N = 256 };
    static const struct { enum ggml_type type; size_t size; void (*decode)(const void *, float *, int64_t); } families[] = {
        { GGML_TYPE_SPLITQ_SQ4,  N/SPLITQ_QK*sizeof(splitq_block_sq4),  splitq_dequantize_row_sq4  },
        { GGML_TYPE_SPLITQ_SQ3,  N/SPLITQ_QK*sizeof(splitq_block_sq3),  splitq_dequantize_row_sq3  },
        { GGML_TYPE_SPLITQ_SQ2,  N/SPLITQ_QK*sizeof(splitq_block_sq2),  splitq_dequantize_row_sq2  },
        { GGML_TYPE_SPLITQ_SQ4X, sizeof(splitq_block_sq4x),             splitq_dequantize_row_sq4x },
        { GGML_TYPE_SPLITQ_SDR4, N/SPLITQ_QK*sizeof(splitq_block_sdr4), splitq_dequantize_row_sdr4 },
        { GGML_TYPE_SPLITQ_SQ6W, N/SPLITQ_QK*sizeof(splitq_block_sq6w), splitq_dequantize_row_sq6w },
        { GGML_TYPE_SPLITQ_SQ5W, N/SPLITQ_QK*sizeof(splitq_block_sq5w), splitq_dequantize_row_sq5w },
        { GGML_TYPE_SPLITQ_SQ4W, N/SPLITQ_QK*sizeof(splitq_block_sq4w), splitq_dequantize_row_sq4w },
        { GGML_TYPE_SPLITQ_SQ3W, N/SPLITQ_QK*sizeof(splitq_block_sq3w), splitq_dequantize_row_sq3w },
        { GGML_TYPE_SPLITQ_SQ2W, N/SPLITQ_QK*sizeof(splitq_block_sq2w), splitq_dequantize_row_sq2w },
    };
    const int k = below(sizeof(families)/sizeof(families[0]));
    void  * data = allocated(families[k].size);
    float * y = allocated(N*sizeof(float));
    fill(data, families[k].size);
    if (families[k].type == GGML_TYPE_SPLITQ_SQ4X) { // no random range holds, so mostly a sound one
        splitq_block_sq4x * b = data;
        finite_halves(b->scale, 3);
        finite_halves(b->min, 3);
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 8; ++j) { b->sub[i].range[j] &= below(2) ? 0x55 : 0xaa; }
        }
        if (below(2)) { fill((char *) data + below(families[k].size), 1); }
    }
    const bool sound = families[k].type == GGML_TYPE_SPLITQ_SDR4 || splitq_validate_blocks(families[k].type, data, 1);
    families[k].decode(data, y, N); // what was not validated is decoded, too: llama.cpp validates when it is told to
    for (int i = 0; i < N; ++i) {
        if (sound && !isfinite(y[i])) { fprintf(stderr, "type %d: a weight is not finite\n", families[k].type); abort(); }
    }
    free(y);
    free(data);
}

int main(int argc, char ** argv) {
    const long rounds = argc > 1 ? atol(argv[1]) : 1000;
    state = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1)*0x9e3779b97f4a7c15ull | 1;
    for (long i = 0; i < rounds; ++i) {
        side_tensors();
        blocks();
    }
    for (int i = 0; answers[i].answer; ++i) { printf("%ld %s\n", answers[i].count, answers[i].answer); }
    return 0;
}
