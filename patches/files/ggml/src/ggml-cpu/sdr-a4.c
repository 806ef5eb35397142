// SPDX-License-Identifier: MIT
#include "sdr-a4.h"

#include "sdr.h"
#include "ggml-sdr.h"
#include "ggml-impl.h"

// A token: its scale and its integers, at a multiple of 64 bytes.
struct razored {
    float scale;
    sdr_block_a4 blocks[];
};

static size_t razored_size(const struct ggml_tensor * y) {
    return GGML_PAD(sizeof(struct razored) + y->ne[0]/SDR_QK*sizeof(sdr_block_a4), 64);
}

bool sdr_a4_claims(const struct ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * y = op->src[1];
    return x->type == GGML_TYPE_SPLITQ_SDR4 && x->view_src == NULL && x->ne[3] == 1 &&
        x->nb[0] == sizeof(splitq_block_sdr4) && y->type == GGML_TYPE_F32 && y->ne[3] == 1 && y->nb[0] == sizeof(float) &&
        op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

size_t sdr_a4_work_size(const struct ggml_tensor * op) {
    size_t reference = ggml_row_size(GGML_TYPE_Q8_0, op->src[1]->ne[0])*op->src[1]->ne[1]*op->src[1]->ne[2] + 64;
    if (op->op == GGML_OP_MUL_MAT_ID) { // counts, rows and a counter for each expert, see ggml_graph_plan
        reference += op->src[0]->ne[2]*(sizeof(int64_t) + 64 + 2*sizeof(int32_t)*op->src[2]->ne[0]*op->src[2]->ne[1]) + 256;
    }
    return MAX(reference, razored_size(op->src[1])*op->src[1]->ne[1]*op->src[1]->ne[2] + 64);
}

bool sdr_a4_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref) {
        return false;
    }
    const struct ggml_tensor * x   = dst->src[0];
    const struct ggml_tensor * y   = dst->src[1];
    const struct ggml_tensor * ids = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : NULL;
    const size_t size = razored_size(y);
    char * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    GGML_ASSERT(work + size*y->ne[1]*y->ne[2] <= (char *) params->wdata + params->wsize);

    for (int64_t t = params->ith; t < y->ne[1]*y->ne[2]; t += params->nth) {
        struct razored * token = (struct razored *) (work + t*size);
        const char * row = (const char *) y->data + t % y->ne[1]*y->nb[1] + t/y->ne[1]*y->nb[2];
        token->scale = sdr_razor_activations((const float *) row, token->blocks, y->ne[0]);
    }
    ggml_barrier(params->threadpool);

    const int64_t first = x->ne[1]*params->ith/params->nth, last = x->ne[1]*(params->ith + 1)/params->nth;
    for (int64_t i2 = 0; i2 < dst->ne[2]; ++i2) {
        for (int64_t i1 = 0; i1 < dst->ne[1]; ++i1) {
            // broadcasting: many matrices of y to one of x; of experts, many to one row of y
            const int64_t matrix = ids ? *(const int32_t *) ((const char *) ids->data + i1*ids->nb[0] + i2*ids->nb[1]) :
                                         i2/(dst->ne[2]/x->ne[2]);
            const struct razored * token = (const struct razored *) (work + (i1 % y->ne[1] + i2*y->ne[1])*size);
            float * out = (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2]);
            for (int64_t r = first; r < last; ++r) {
                const char * row = (const char *) x->data + matrix*x->nb[2] + r*x->nb[1];
                out[r] = sdr_vec_dot_sdr4_a4(x->ne[0], row, token->blocks, token->scale);
            }
        }
    }
    return true;
}
