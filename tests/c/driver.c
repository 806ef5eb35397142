// SPDX-License-Identifier: MIT
// Runs the patch series' C code outside ggml, so that a test can build it for any instruction set.
//
//   driver encode TYPE N ROWS WEIGHTED   stdin: float32 rows, then (if WEIGHTED) N importances; stdout: blocks
//   driver cache  TYPE N ROWS            the same for sdr4 as a KV cache has it
//   driver dot    TYPE N ROWS            stdin: blocks of each row, then q8_0 blocks of each row; stdout: float32 dots
//   driver razor  TYPE N ROWS            the same for sdr4 and float32 rows of activations, razored to 4 bits
//   driver mul    TYPE N ROWS MATRICES TOKENS REPEATS INTERLEAVED THREADS   MUL_MAT; REPEATS batches of TOKENS a matrix
//   driver mul_id TYPE N ROWS MATRICES TOKENS USED INTERLEAVED THREADS SAME   MUL_MAT_ID; SAME: the experts of a token
//                                                                           share its row
//          stdin: blocks of each matrix, float32 activations, for mul_id int32 experts [TOKENS][USED]; stdout: the result,
//          or nothing where this instruction set has no kernel
//          weights with side tensors have two more arguments, bytes of the side tensor for each matrix and whether to take
//          the reference, and the side tensors at the end of stdin
//   driver sweep BITS ROWS SCALES CLOSED HELD   stdin: levels, aims, base, scales, push, costs, then (if HELD) states;
//                                               stdout: edges, then int64 choices
//   driver razor_mul, razor_mul_id ...   the same for sdr4 with activations razored to 4 bits
#define _GNU_SOURCE
#include "ggml-columns.c"
#include "ggml-splitq.c"
#include "ggml-sdr.c"
#include "ggml-windows.c"
#include "ggml-windows-solve.c"
#undef SPLITQ_UNROLL
#include "ggml-cpu/splitq.c"
#include "ggml-cpu/splitq-mul.c"
#include "ggml-cpu/columns.c"
#include "ggml-cpu/columns-mul.c"
#include "ggml-cpu/sdr.c"
#include "ggml-cpu/sdr-a4.c"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

// What the included files take from ggml.c.
void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    exit(1);
}

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type) { // only for splitq_errors, not called here
    (void) type;
    return NULL;
}

static size_t block_bytes(enum ggml_type type) {
    return ggml_splitq_has_columns(type) ? (size_t) (4*columns_bits(type) + !columns_has_codebooks(type)) :
           type == GGML_TYPE_SPLITQ_SQ4 ? sizeof(splitq_block_sq4) : type == GGML_TYPE_SPLITQ_SQ3 ? sizeof(splitq_block_sq3) :
           type == GGML_TYPE_SPLITQ_SQ2 ? sizeof(splitq_block_sq2) : type == GGML_TYPE_SPLITQ_SDR4 ? sizeof(splitq_block_sdr4) :
           type == GGML_TYPE_SPLITQ_SQ4W ? sizeof(splitq_block_sq4w) : type == GGML_TYPE_SPLITQ_SQ3W ? sizeof(splitq_block_sq3w) :
           type == GGML_TYPE_SPLITQ_SQ2W ? sizeof(splitq_block_sq2w) : type == GGML_TYPE_SPLITQ_SQ5W ? sizeof(splitq_block_sq5w) :
           type == GGML_TYPE_SPLITQ_SQ6W ? sizeof(splitq_block_sq6w) :
           sizeof(splitq_block_sq4x);
}

size_t ggml_row_size(enum ggml_type type, int64_t n) {
    return type == GGML_TYPE_Q8_0 ? n / QK8_0 * sizeof(block_q8_0) : n / (type == GGML_TYPE_SPLITQ_SQ4X ? SPLITQ_QK_SQ4X : SPLITQ_QK) * block_bytes(type);
}

void ggml_vec_swiglu_f32(const int n, float * y, const float * x, const float * g) {
    for (int i = 0; i < n; ++i) { y[i] = x[i]/(1 + expf(-x[i]))*g[i]; }
}

// A barrier of its own: macOS has no pthread_barrier_t.
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  all_here = PTHREAD_COND_INITIALIZER;
static int             team_size, here, rounds;
static atomic_int      chunk;

void ggml_barrier(struct ggml_threadpool * pool) {
    (void) pool;
    pthread_mutex_lock(&mutex);
    const int round = rounds;
    if (++here == team_size) {
        here = 0;
        ++rounds;
        pthread_cond_broadcast(&all_here);
    }
    while (round == rounds) { pthread_cond_wait(&all_here, &mutex); }
    pthread_mutex_unlock(&mutex);
}

void ggml_threadpool_chunk_set(struct ggml_threadpool * pool, int value) {
    (void) pool;
    chunk = value;
}

int ggml_threadpool_chunk_add(struct ggml_threadpool * pool, int value) {
    (void) pool;
    return atomic_fetch_add(&chunk, value);
}

void quantize_row_q8_0(const float * x, void * y, int64_t n) {
    block_q8_0 * b = y;
    for (int64_t i = 0; i < n/QK8_0; ++i, x += QK8_0) {
        float max = 0;
        for (int j = 0; j < QK8_0; ++j) { max = fmaxf(max, fabsf(x[j])); }
        const float d = max/127, inverse = d ? 1/d : 0;
        b[i].d = ggml_compute_fp32_to_fp16(d);
        for (int j = 0; j < QK8_0; ++j) { b[i].qs[j] = (int8_t) nearbyintf(x[j]*inverse); }
    }
}

// Memory that ends where a page begins that cannot be touched.
static void * guarded(size_t size) {
    const size_t page = 65536, whole = (size + page - 1)/page*page;
    char * p = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(p + whole, page, PROT_NONE);
    return p + whole - size;
}

static void * read_all(size_t size) {
    void * data = guarded(size);
    if (fread(data, 1, size, stdin) != size) {
        fprintf(stderr, "short input\n");
        exit(1);
    }
    return data;
}

static struct ggml_tensor tensor(enum ggml_type type, size_t element, void * data, int64_t n0, int64_t n1, int64_t n2) {
    struct ggml_tensor t = { .type = type, .ne = { n0, n1, n2, 1 }, .data = data };
    t.nb[0] = element;
    t.nb[1] = type >= GGML_TYPE_SPLITQ_SQ4 ? ggml_row_size(type, n0) : element*n0;
    t.nb[2] = t.nb[1]*n1;
    t.nb[3] = t.nb[2]*n2;
    return t;
}

struct thread {
    pthread_t id;
    struct ggml_compute_params params;
    struct ggml_tensor * dst;
    bool (*forward)(const struct ggml_compute_params * params, struct ggml_tensor * dst);
};

// As splitq-hook.cpp has it.
static bool multiply_columns(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (!params->use_ref && splitq_mul_claims(dst)) {
        return splitq_mul_forward(params, dst);
    }
    columns_forward(params, dst, splitq_mul_lanes(dst->src[0]));
    return true;
}

static void * run(void * arg) {
    struct thread * t = arg;
    t->forward(&t->params, t->dst);
    return NULL;
}

static int multiply(bool razored, bool experts, enum ggml_type type, int64_t n, int64_t rows, char ** argv) {
    const int64_t matrices = atoi(argv[0]), tokens = atoi(argv[1]), used = atoi(argv[2]);
    const int threads = atoi(argv[4]);
    const int64_t n1 = !experts ? tokens : atoi(argv[5]) ? 1 : used;
    const int64_t n2 = experts ? tokens : matrices*used;
    void * weights = read_all(ggml_row_size(type, n)*rows*matrices);
    void * values  = read_all(sizeof(float)*n*n1*n2);
    void * chosen  = experts ? read_all(sizeof(int32_t)*used*tokens) : NULL;
    char ** last   = argv + (experts ? 6 : 5);
    const bool columns = ggml_splitq_has_columns(type);
    const size_t side_size = columns ? atoi(last[0]) : 0;
    struct ggml_tensor side = tensor(GGML_TYPE_I8, 1, read_all(side_size*matrices), side_size, matrices, 1);
    for (int64_t i = 0; columns && i < matrices; ++i) {
        const char * wrong = ggml_splitq_check_columns(type, n, rows, (char *) side.data + i*side_size, side_size);
        if (wrong) {
            fprintf(stdout, "%s", wrong);
            return 0;
        }
    }

    const int64_t results = experts ? used : tokens;
    struct ggml_tensor x = tensor(type, ggml_row_size(type, SPLITQ_QK), weights, n, rows, matrices);
    struct ggml_tensor y = tensor(GGML_TYPE_F32, sizeof(float), values, n, n1, n2);
    struct ggml_tensor ids = tensor(GGML_TYPE_I32, sizeof(int32_t), chosen, used, tokens, 1);
    struct ggml_tensor dst = tensor(GGML_TYPE_F32, sizeof(float), guarded(sizeof(float)*rows*results*n2), rows, results, n2);
    dst.op = experts ? GGML_OP_MUL_MAT_ID : GGML_OP_MUL_MAT;
    dst.src[0] = &x;
    dst.src[1] = &y;
    dst.src[2] = experts ? &ids : NULL;
    dst.src[3] = columns ? &side : NULL;
    if (atoi(argv[3])) {
        if (!splitq_mul_can_interleave(&x)) {
            return 0;
        }
        x.data = guarded(ggml_row_size(type, n)*rows*matrices);
        splitq_mul_interleave(&x, weights);
    }
    if (!(razored ? sdr_a4_claims : columns ? columns_claims : splitq_mul_claims)(&dst)) {
        return 0;
    }

    const size_t size = razored ? sdr_a4_work_size(&dst) : MAX(columns ? columns_work_size(threads, &dst) : 0, splitq_mul_work_size(threads, &dst));
    char * work = guarded(size);
    struct thread team[16];
    team_size = threads;
    for (int i = 0; i < threads; ++i) {
        team[i] = (struct thread) { .params = { .ith = i, .nth = threads, .wsize = size, .wdata = work,
                                                 .use_ref = columns && atoi(last[1]) }, .dst = &dst,
                                     .forward = razored ? sdr_a4_forward : columns ? multiply_columns : splitq_mul_forward };
        pthread_create(&team[i].id, NULL, run, &team[i]);
    }
    for (int i = 0; i < threads; ++i) { pthread_join(team[i].id, NULL); }
    return fwrite(dst.data, sizeof(float)*rows, results*n2, stdout) != (size_t) (results*n2);
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        return 2;
    }
    const enum ggml_type type = atoi(argv[2]);
    const int n = atoi(argv[3]), rows = atoi(argv[4]);
    const size_t row_size = ggml_row_size(type, n);

    if (strstr(argv[1], "mul")) {
        return multiply(argv[1][0] == 'r', strstr(argv[1], "mul_id") != NULL, type, n, rows, argv + 5);
    }
    if (strcmp(argv[1], "cache") == 0) {
        const float * x = read_all(sizeof(float)*n*rows);
        char * out = malloc(row_size*rows);
        splitq_quantize_row_sdr4(x, out, (int64_t) n*rows);
        return fwrite(out, row_size, rows, stdout) != (size_t) rows;
    }
    if (strcmp(argv[1], "encode") == 0) {
        const float * x       = read_all(sizeof(float)*n*rows);
        const float * imatrix = atoi(argv[5]) ? read_all(sizeof(float)*n) : NULL;
        char * out = malloc(row_size*rows);
        if (type == GGML_TYPE_SPLITQ_SDR4) {
            sdr_quantize_chunk(x, out, rows, n, imatrix);
        } else {
            splitq_quantize_chunk(type, x, out, rows, n, imatrix);
        }
        return fwrite(out, row_size, rows, stdout) != (size_t) rows;
    }

    if (strcmp(argv[1], "sweep") == 0) {
        const int bits = atoi(argv[2]), rows = atoi(argv[3]), scales = atoi(argv[4]);
        const float * levels = read_all((bits > 4 ? 128 : 64)*4);
        const float * aims = read_all(32*4*rows), * base = read_all(32*4*rows), * each = read_all(4*rows*scales);
        const float * push = read_all(32*32*4), * costs = read_all(32*4);
        const uint8_t * states = atoi(argv[6]) ? read_all(rows*(bits >= 4 ? 2 : 1)) : NULL;
        uint8_t * edges = malloc(32*rows);
        int64_t * choice = malloc(sizeof(int64_t)*rows);
        const splitq_sweep s = { bits, scales, atoi(argv[5]), rows, levels, aims, base, each, push, costs, states, edges, choice };
        splitq_windows_sweep(&s);
        fwrite(edges, 32, rows, stdout);
        fwrite(choice, sizeof(int64_t), rows, stdout);
        return 0;
    }
    if (strcmp(argv[1], "razor") == 0) {
        const char  * x = read_all(row_size*rows);
        const float * y = read_all(sizeof(float)*n*rows);
        sdr_block_a4 * razored = malloc(n/32*sizeof(*razored));
        for (int row = 0; row < rows; ++row) {
            const float scale = sdr_razor_activations(y + row*n, razored, n);
            const float s = sdr_vec_dot_sdr4_a4(n, x + row*row_size, razored, scale);
            fwrite(&s, sizeof(s), 1, stdout);
        }
        return 0;
    }

    const size_t q8_size = n/QK8_0*sizeof(block_q8_0);
    const char * x = read_all(row_size*rows);
    const char * y = read_all(q8_size*rows);
    for (int row = 0; row < rows; ++row) {
        float s;
        (type == GGML_TYPE_SPLITQ_SQ4 ? splitq_vec_dot_sq4_q8_0 : type == GGML_TYPE_SPLITQ_SQ3 ? splitq_vec_dot_sq3_q8_0 :
         type == GGML_TYPE_SPLITQ_SQ2 ? splitq_vec_dot_sq2_q8_0 : type == GGML_TYPE_SPLITQ_SDR4 ? splitq_vec_dot_sdr4_q8_0 :
         type == GGML_TYPE_SPLITQ_SQ4W ? splitq_vec_dot_sq4w_q8_0 : type == GGML_TYPE_SPLITQ_SQ3W ? splitq_vec_dot_sq3w_q8_0 :
         type == GGML_TYPE_SPLITQ_SQ2W ? splitq_vec_dot_sq2w_q8_0 : type == GGML_TYPE_SPLITQ_SQ5W ? splitq_vec_dot_sq5w_q8_0 :
         type == GGML_TYPE_SPLITQ_SQ6W ? splitq_vec_dot_sq6w_q8_0 : splitq_vec_dot_sq4x_q8_0)(
            n, &s, 0, x + row*row_size, 0, y + row*q8_size, 0, 1);
        fwrite(&s, sizeof(s), 1, stdout);
    }
    return 0;
}
