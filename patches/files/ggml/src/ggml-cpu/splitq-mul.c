#include "splitq-mul.h"

#include "quants.h"
#include "splitq-ints.h"
#include "splitq-vec.h"

// Activations are quantized to q8_0 once and laid out for one of two kernels:
//
//   few tokens    row by row: LANES blocks of a row give LANES integer sums, which meet LANES scales in one
//                 multiply-add. Weights are read once, in the order in which they are stored.
//   many tokens   ROWS rows are decoded to bytes, then multiplied with LANES tokens at a time, a token in each lane.
//
// Both add in an order that depends on the shapes alone.

#if defined(LANES)

// The processor's own prefetching ends with each page of 4 KB, and files are mapped in such pages.
#if defined(__GNUC__)
#define SPLITQ_PREFETCH(at, bytes) for (size_t ahead = 2048; ahead + 32 < 2048 + (bytes); ahead += 64) { __builtin_prefetch((const void *) ((uintptr_t) (at) + ahead)); }
#else
#define SPLITQ_PREFETCH(at, bytes)
#endif

#define SPLITQ_FEW 3 // tokens up to which rows are multiplied as stored

// LANES blocks of one row of activations, for few tokens. Vector v of weights holds blocks UNITS*(LANES/4*v + c) .. + UNITS - 1
// in its 128-bit part c, so q has for each vector its 2*UNITS pieces of 16/UNITS weights of each block, and the sums of
// block UNITS*(LANES/4*v + c) + i arrive in lane 4*c + UNITS*v + i, in which order bias and d are.
struct few {
    int8_t  q[32*LANES];
    int32_t bias[LANES];
    float   d[LANES];
};

// One block of LANES rows of activations, for many tokens. q: byte 4*(LANES*i + t) + j is weight 4*i + j of token t, plus BIAS.
struct many {
    uint8_t q[32*LANES];
    float   d[LANES];
};

// One block of ROWS rows of weights.
struct tile {
    int8_t  q[ROWS][32];
    int32_t bias[ROWS];
    float   d[ROWS];
};

// Activations of blocks [LANES*first, LANES*last) of a row of nb blocks; past its end they are zero.
static void pack_few(const float * x, int nb, int units, int first, int last, struct few * y) {
    const int parts = LANES/4, pieces = 2*units;
    for (int g = first; g < last; ++g) {
        block_q8_0 q8[LANES];
        const int n = MIN(nb - LANES*g, LANES);
        memset(q8, 0, sizeof(q8));
        quantize_row_q8_0(x + 32*LANES*g, q8, 32*n);
        for (int b = 0; b < LANES; ++b) {
            const int v = b/(units*parts), c = b/units%parts, i = b%units;
            int32_t sum = 0;
            for (int p = 0; p < pieces; ++p) {
                int8_t * to = y[g].q + 16*(parts*(pieces*v + p) + c);
                units == 1 ? memcpy(to, q8[b].qs + 16*p, 16) : memcpy(to + 8*i, q8[b].qs + 8*p, 8);
            }
            for (int j = 0; j < 32; ++j) { sum += q8[b].qs[j]; }
            y[g].bias[4*c + units*v + i] = -BIAS*sum;
            y[g].d[4*c + units*v + i]    = to_float(q8[b].d)*0x1p-4f; // see scale_f
        }
    }
}

// Activations of blocks [first, last) of one token into lane t. A token that is not there has x NULL.
static void pack_many(const float * x, int t, int first, int last, struct many * y) {
    block_q8_0 q8 = { 0 };
    for (int b = first; b < last; ++b) {
        if (x != NULL) {
            quantize_row_q8_0(x + 32*b, &q8, 32);
        }
        for (int i = 0; i < 8; ++i) {
            uint8_t four[4];
            for (int j = 0; j < 4; ++j) { four[j] = (uint8_t) (q8.qs[4*i + j] + BIAS); }
            memcpy(y[b].q + 4*(LANES*i + t), four, 4);
        }
        y[b].d[t] = to_float(q8.d);
    }
}

// ROWS rows times LANES tokens. out[row][token]
static void mul_tile(const struct tile * x, const struct many * y, int nb, float out[ROWS][LANES]) {
    vec_f sum[ROWS];
    for (int r = 0; r < ROWS; ++r) { sum[r] = zero_f(); }
    for (int b = 0; b < nb; ++b) {
        vec_b q[8];
        for (int i = 0; i < 8; ++i) { q[i] = load_b(y[b].q + 4*LANES*i); }
        arrange(q);
        const vec_f d = load_f(y[b].d);
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
        for (int r = 0; r < ROWS; r += 2) {
            vec_i dots[2] = { set_i(x[b].bias[r]), set_i(x[b].bias[r + 1]) };
            dot_rows(dots, q, x[b].q + r);
            sum[r]     = fma_f(mul_f(to_f(dots[0]), d), set_f(x[b].d[r]),     sum[r]);
            sum[r + 1] = fma_f(mul_f(to_f(dots[1]), d), set_f(x[b].d[r + 1]), sum[r + 1]);
        }
    }
    for (int r = 0; r < ROWS; ++r) { store_f(out[r], sum[r]); }
}

// mul_rows_<type>: rows times one token. A last group that is not whole is read beyond the row's end, which meets
// activations of zero, or from a copy where that would be beyond `end`, the end of the tensor.
// decode_<type>: up to ROWS rows, the others are zero.
#define SPLITQ_KERNELS(name, units)                                                                                   \
    static inline vec_f mul_groups_##name(const splitq_block_##name * x, int groups, vec_t table, const struct few * y, vec_f sum) { \
        for (int g = 0; g < groups; ++g, x += LANES, ++y) {                                                           \
            vec_i part[4/units];                                                                                      \
            vec_d d = zero_d();                                                                                       \
            for (int v = 0; v < 4/units; ++v) {                                                                       \
                vec_b level[2*units];                                                                                 \
                SPLITQ_PREFETCH(x + units*LANES/4*v, units*LANES/4*sizeof(*x))                                        \
                d = unpack_##name(x + units*LANES/4*v, v, table, level, d);                                           \
                part[v] = zero_i();                                                                                   \
                for (int p = 0; p < 2*units; ++p) {                                                                   \
                    part[v] = dot(part[v], level[p], load_b(y->q + 4*LANES*(2*units*v + p)));                         \
                }                                                                                                     \
            }                                                                                                         \
            const vec_i dots = add_i(reduce_##units(part), load_i(y->bias));                                          \
            sum = fma_f(to_f(dots), mul_f(scale_f(d), load_f(y->d)), sum);                                            \
        }                                                                                                             \
        return sum;                                                                                                   \
    }                                                                                                                 \
                                                                                                                      \
    static void mul_rows_##name(const char * row, size_t stride, int64_t rows, const char * end, int nb, const struct few * y, float * out) { \
        const int groups = (nb + LANES - 1)/LANES;                                                                    \
        const vec_t table = load_tables(table_##name, sizeof(splitq_levels_##name));                                  \
        for (int64_t r = 0; r < rows; ++r, row += stride) {                                                           \
            const splitq_block_##name * x = (const void *) row;                                                       \
            if ((const char *) (x + LANES*groups) <= end) {                                                           \
                out[r] = sum_f(mul_groups_##name(x, groups, table, y, zero_f()));                                     \
            } else {                                                                                                  \
                splitq_block_##name copy[LANES] = { 0 };                                                              \
                memcpy(copy, x + LANES*(groups - 1), sizeof(*x)*(nb - LANES*(groups - 1)));                           \
                const vec_f sum = mul_groups_##name(x, groups - 1, table, y, zero_f());                               \
                out[r] = sum_f(mul_groups_##name(copy, 1, table, y + groups - 1, sum));                               \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    static void decode_##name(const char * row, size_t stride, int rows, int nb, struct tile * t) {                   \
        for (int r = 0; r < ROWS; ++r, row += stride) {                                                               \
            const splitq_block_##name * x = (const void *) row;                                                       \
            for (int b = 0; b < nb; ++b) {                                                                            \
                if (r < rows) {                                                                                       \
                    const ints level = look_up(codes_##name(x + b), table_##name);                                    \
                    store_ints(t[b].q[r], level);                                                                     \
                    t[b].bias[r] = -BIAS*sum_ints(level);                                                             \
                    t[b].d[r]    = splitq_scale[x[b].d];                                                              \
                } else {                                                                                              \
                    memset(t[b].q[r], 0, 32);                                                                         \
                    t[b].bias[r] = 0;                                                                                 \
                    t[b].d[r]    = 0;                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }

SPLITQ_KERNELS(sq4, 1)
SPLITQ_KERNELS(sq3, 2)
SPLITQ_KERNELS(sq2, 2)

struct kernels {
    int units;
    void (*mul_rows)(const char * row, size_t stride, int64_t rows, const char * end, int nb, const struct few * y, float * out);
    void (*decode)(const char * row, size_t stride, int rows, int nb, struct tile * t);
};

static const struct kernels * kernels_of(enum ggml_type type) {
    static const struct kernels sq4 = { 1, mul_rows_sq4, decode_sq4 };
    static const struct kernels sq3 = { 2, mul_rows_sq3, decode_sq3 };
    static const struct kernels sq2 = { 2, mul_rows_sq2, decode_sq2 };
    switch (type) {
        case GGML_TYPE_SPLITQ_SQ4: return &sq4;
        case GGML_TYPE_SPLITQ_SQ3: return &sq3;
        case GGML_TYPE_SPLITQ_SQ2: return &sq2;
        default: return NULL;
    }
}

bool splitq_mul_claims(const struct ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * y = op->src[1];
    return kernels_of(x->type) && x->view_src == NULL && x->ne[3] == 1 && x->nb[0] == ggml_row_size(x->type, SPLITQ_QK) &&
        y->type == GGML_TYPE_F32 && y->ne[3] == 1 && y->nb[0] == sizeof(float) &&
        op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

struct token {
    int32_t i1, i2; // its indices in dst
};

// The tokens of one matrix: of src0, or of one expert.
struct job {
    int64_t matrix, count;
    struct token * tokens; // NULL: all that broadcasting gives this matrix
    char * packed;         // their activations, struct few or struct many
};

// How an operation's work buffer is used: jobs, tokens of the jobs (both MUL_MAT_ID only), packed activations, and for each
// thread the tiles of one chunk of rows.
struct layout {
    int64_t nb;                    // blocks in a row
    int64_t chunk;                 // rows of a unit of work
    size_t  few, many;             // bytes of one token's, of LANES tokens' activations
    size_t  tokens, packed, tiles; // offsets
    size_t  tile, size;            // bytes of a thread's tiles, of the whole
};

static size_t packed_size(const struct layout * l, int64_t count) {
    return count <= SPLITQ_FEW ? l->few*count : l->many*((count + LANES - 1)/LANES);
}

static struct layout layout_of(const struct ggml_tensor * op, int n_threads) {
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * ids = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : NULL;
    struct layout l;
    l.nb   = x->ne[0]/SPLITQ_QK;
    l.few  = sizeof(struct few)*((l.nb + LANES - 1)/LANES);
    l.many = sizeof(struct many)*l.nb;

    const int64_t matrices = x->ne[2];
    const int64_t tokens   = ids ? ids->ne[0]*ids->ne[1] : op->ne[1]*op->ne[2]/matrices; // of all experts, of each matrix
    l.tokens = ids ? GGML_PAD(sizeof(int64_t) + sizeof(struct job)*matrices, 64) : 0;
    l.packed = l.tokens + (ids ? GGML_PAD(sizeof(struct token)*tokens, 64) : 0);
    if (ids) { // at most, however the tokens are spread
        const int64_t many = MIN(tokens/LANES + matrices, tokens/(SPLITQ_FEW + 1));
        l.tiles = l.packed + l.few*MIN(tokens, SPLITQ_FEW*matrices) + l.many*many;
    } else {
        l.tiles = l.packed + matrices*packed_size(&l, tokens);
    }
    l.chunk = ids || tokens > SPLITQ_FEW ? 32 : 64;
    while (l.chunk > ROWS && (ids ? 1 : matrices)*((x->ne[1] + l.chunk - 1)/l.chunk) < 4*n_threads) {
        l.chunk /= 2;
    }
    l.tile = tokens > SPLITQ_FEW ? sizeof(struct tile)*l.nb*(l.chunk/ROWS) : 0;
    l.size = l.tiles + l.tile*n_threads;
    return l;
}

size_t splitq_mul_work_size(int n_threads, const struct ggml_tensor * op) {
    size_t reference = ggml_row_size(GGML_TYPE_Q8_0, op->src[1]->ne[0])*op->src[1]->ne[1]*op->src[1]->ne[2] + 64;
    if (op->op == GGML_OP_MUL_MAT_ID) { // counts, rows and a counter for each expert, see ggml_graph_plan
        reference += op->src[0]->ne[2]*(sizeof(int64_t) + 64 + 2*sizeof(int32_t)*op->src[2]->ne[0]*op->src[2]->ne[1]) + 256;
    }
    return MAX(reference, layout_of(op, n_threads).size + 64);
}

// MUL_MAT: one job for each matrix.
static struct job job_of(const struct layout * l, const struct ggml_tensor * dst, int64_t i, char * work) {
    const int64_t count = dst->ne[1]*dst->ne[2]/dst->src[0]->ne[2];
    return (struct job) { i, count, NULL, work + l->packed + i*packed_size(l, count) };
}

// Sorts the tokens by expert: jobs for those that have any.
static void route(const struct layout * l, const struct ggml_tensor * ids, int64_t experts, char * work) {
    struct job * jobs = (struct job *) (work + sizeof(int64_t));
    struct token * tokens = (struct token *) (work + l->tokens);
    char * packed = work + l->packed;
    int64_t n = 0;
    for (int64_t e = 0; e < experts; ++e) { jobs[e] = (struct job) { 0 }; }
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            jobs[*(const int32_t *) ((const char *) ids->data + i*ids->nb[0] + t*ids->nb[1])].count++;
        }
    }
    for (int64_t e = 0; e < experts; ++e) {
        jobs[e].matrix = e;
        jobs[e].tokens = tokens; // moves to the end of the expert's tokens below
        tokens += jobs[e].count;
    }
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            struct job * job = &jobs[*(const int32_t *) ((const char *) ids->data + i*ids->nb[0] + t*ids->nb[1])];
            *job->tokens++ = (struct token) { (int32_t) i, (int32_t) t };
        }
    }
    for (int64_t e = 0; e < experts; ++e) {
        if (jobs[e].count) {
            struct job * job = &jobs[n++];
            *job = jobs[e];
            job->tokens -= job->count;
            job->packed  = packed;
            packed += packed_size(l, job->count);
        }
    }
    *(int64_t *) work = n;
}

static inline struct token token_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    if (job->tokens) {
        return job->tokens[t];
    }
    const int64_t repeats = dst->ne[2]/dst->src[0]->ne[2];
    return (struct token) { (int32_t) (t % dst->ne[1]), (int32_t) (t/dst->ne[1] + job->matrix*repeats) };
}

static const float * row_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    const struct ggml_tensor * y = dst->src[1];
    const struct token at = token_of(job, dst, t);
    return (const float *) ((const char *) y->data + at.i1 % y->ne[1]*y->nb[1] + at.i2*y->nb[2]);
}

static float * result_of(const struct job * job, const struct ggml_tensor * dst, int64_t t) {
    const struct token at = token_of(job, dst, t);
    return (float *) ((char *) dst->data + at.i1*dst->nb[1] + at.i2*dst->nb[2]);
}

// Thread ith of nth packs its share of each row.
static void pack(const struct layout * l, const struct job * job, const struct ggml_tensor * dst, int ith, int nth) {
    const int64_t n = job->count <= SPLITQ_FEW ? (l->nb + LANES - 1)/LANES : l->nb;
    const int first = n*ith/nth, last = n*(ith + 1)/nth;
    if (job->count <= SPLITQ_FEW) {
        const int units = kernels_of(dst->src[0]->type)->units;
        for (int64_t t = 0; t < job->count; ++t) {
            pack_few(row_of(job, dst, t), l->nb, units, first, last, (struct few *) (job->packed + l->few*t));
        }
    } else {
        for (int64_t t = 0; t < GGML_PAD(job->count, LANES); ++t) {
            const float * x = t < job->count ? row_of(job, dst, t) : NULL;
            pack_many(x, t % LANES, first, last, (struct many *) (job->packed + l->many*(t/LANES)));
        }
    }
}

// Rows [first, last) of one matrix times its tokens.
static void mul_rows(const struct layout * l, const struct job * job, const struct ggml_tensor * dst, int64_t first, int64_t last, struct tile * tiles) {
    const struct ggml_tensor * x = dst->src[0];
    const struct kernels * k = kernels_of(x->type);
    const char * row = (const char *) x->data + job->matrix*x->nb[2];
    const char * end = (const char *) x->data + (x->ne[2] - 1)*x->nb[2] + (x->ne[1] - 1)*x->nb[1] + ggml_row_size(x->type, x->ne[0]);
    if (job->count <= SPLITQ_FEW) {
        for (int64_t t = 0; t < job->count; ++t) {
            const struct few * y = (const struct few *) (job->packed + l->few*t);
            k->mul_rows(row + first*x->nb[1], x->nb[1], last - first, end, l->nb, y, result_of(job, dst, t) + first);
        }
        return;
    }
    for (int64_t r = first; r < last; r += ROWS) {
        k->decode(row + r*x->nb[1], x->nb[1], MIN(ROWS, last - r), l->nb, tiles + (r - first)/ROWS*l->nb);
    }
    for (int64_t t = 0; t < job->count; t += LANES) {
        for (int64_t r = first; r < last; r += ROWS) {
            float out[ROWS][LANES];
            mul_tile(tiles + (r - first)/ROWS*l->nb, (const struct many *) (job->packed + l->many*(t/LANES)), l->nb, out);
            for (int i = 0; i < MIN(LANES, job->count - t); ++i) {
                float * to = result_of(job, dst, t + i) + r;
                for (int j = 0; j < MIN(ROWS, last - r); ++j) { to[j] = out[j][i]; }
            }
        }
    }
}

bool splitq_mul_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref) {
        return false;
    }
    const int ith = params->ith, nth = params->nth;
    const struct ggml_tensor * x = dst->src[0];
    const bool experts = dst->op == GGML_OP_MUL_MAT_ID;
    const struct layout l = layout_of(dst, nth);
    char * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    GGML_ASSERT(work + l.size <= (char *) params->wdata + params->wsize);

    int64_t n_jobs = x->ne[2];
    if (experts) {
        if (ith == 0) {
            route(&l, dst->src[2], x->ne[2], work);
        }
        ggml_barrier(params->threadpool);
        n_jobs = *(const int64_t *) work;
    }
#define SPLITQ_JOB(i) (experts ? ((const struct job *) (work + sizeof(int64_t)))[i] : job_of(&l, dst, i, work))
    for (int64_t i = 0; i < n_jobs; ++i) {
        const struct job job = SPLITQ_JOB(i);
        pack(&l, &job, dst, ith, nth);
    }
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t chunks = (x->ne[1] + l.chunk - 1)/l.chunk;
    for (int64_t c = ith; c < n_jobs*chunks; c = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const struct job job = SPLITQ_JOB(c/chunks);
        const int64_t first = c % chunks*l.chunk;
        mul_rows(&l, &job, dst, first, MIN(first + l.chunk, x->ne[1]), (struct tile *) (work + l.tiles + l.tile*ith));
    }
    return true;
}

#else // no kernels for this instruction set: ggml's own path, with splitq_vec_dot_*

bool splitq_mul_claims(const struct ggml_tensor * op) {
    GGML_UNUSED(op);
    return false;
}

size_t splitq_mul_work_size(int n_threads, const struct ggml_tensor * op) {
    GGML_UNUSED(n_threads), GGML_UNUSED(op);
    return 0;
}

bool splitq_mul_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params), GGML_UNUSED(dst);
    return false;
}

#endif
