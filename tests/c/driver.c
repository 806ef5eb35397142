// Runs the patch series' C code outside ggml, so that a test can build it for any instruction set.
//
//   driver encode TYPE N ROWS WEIGHTED   stdin: float32 rows, then (if WEIGHTED) N importances; stdout: blocks
//   driver dot    TYPE N ROWS            stdin: blocks of each row, then q8_0 blocks of each row; stdout: float32 dots
#include "ggml-splitq.c"
#include "ggml-cpu/splitq.c"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

// What the included files take from ggml.c.
void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    exit(1);
}

static size_t block_bytes(enum ggml_type type) {
    return type == GGML_TYPE_SPLITQ_SQ4 ? sizeof(splitq_block_sq4) : type == GGML_TYPE_SPLITQ_SQ3 ? sizeof(splitq_block_sq3) :
           type == GGML_TYPE_SPLITQ_SQ2 ? sizeof(splitq_block_sq2) : sizeof(splitq_block_sq4x);
}

size_t ggml_row_size(enum ggml_type type, int64_t n) {
    return n / (type == GGML_TYPE_SPLITQ_SQ4X ? SPLITQ_QK_SQ4X : SPLITQ_QK) * block_bytes(type);
}

static void * read_all(size_t size) {
    void * data = malloc(size);
    if (fread(data, 1, size, stdin) != size) {
        fprintf(stderr, "short input\n");
        exit(1);
    }
    return data;
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        return 2;
    }
    const enum ggml_type type = atoi(argv[2]);
    const int n = atoi(argv[3]), rows = atoi(argv[4]);
    const size_t row_size = ggml_row_size(type, n);

    if (strcmp(argv[1], "encode") == 0) {
        const float * x       = read_all(sizeof(float)*n*rows);
        const float * imatrix = atoi(argv[5]) ? read_all(sizeof(float)*n) : NULL;
        char * out = malloc(row_size*rows);
        splitq_quantize_chunk(type, x, out, rows, n, imatrix);
        return fwrite(out, row_size, rows, stdout) != (size_t) rows;
    }

    const size_t q8_size = n/QK8_0*sizeof(block_q8_0);
    const char * x = read_all(row_size*rows);
    const char * y = read_all(q8_size*rows);
    for (int row = 0; row < rows; ++row) {
        float s;
        (type == GGML_TYPE_SPLITQ_SQ4 ? splitq_vec_dot_sq4_q8_0 : type == GGML_TYPE_SPLITQ_SQ3 ? splitq_vec_dot_sq3_q8_0 :
         type == GGML_TYPE_SPLITQ_SQ2 ? splitq_vec_dot_sq2_q8_0 : splitq_vec_dot_sq4x_q8_0)(
            n, &s, 0, x + row*row_size, 0, y + row*q8_size, 0, 1);
        fwrite(&s, sizeof(s), 1, stdout);
    }
    return 0;
}
