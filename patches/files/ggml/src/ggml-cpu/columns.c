// SPDX-License-Identifier: MIT
#include "columns.h"

#include "ggml-columns.h"

bool columns_claims(const struct ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const struct ggml_tensor * x = op->src[0];
    const struct ggml_tensor * y = op->src[1];
    return ggml_splitq_has_columns(x->type) && op->src[3] && op->src[3]->type == GGML_TYPE_I8 && op->src[3]->ne[1] == x->ne[2] &&
        x->view_src == NULL && x->ne[3] == 1 && y->type == GGML_TYPE_F32 && y->nb[0] == sizeof(float) &&
        op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

size_t columns_work_size(int n_threads, const struct ggml_tensor * op) {
    return n_threads*sizeof(float)*op->src[0]->ne[0];
}

static float exact_dot(const float * w, const char * y, int64_t n) {
    const float * x = (const float *) y;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) { sum += (double) w[i]*(double) x[i]; }
    return (float) sum;
}

void columns_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst, int lanes) {
    const struct ggml_tensor * x = dst->src[0], * y = dst->src[1], * ids = dst->src[2];
    const int64_t rows = x->ne[1], all = rows*x->ne[2], repeats = dst->ne[2]/x->ne[2];
    const size_t row_size = ggml_row_size(x->type, x->ne[0]);
    float * row = (float *) params->wdata + params->ith*x->ne[0];
    for (int64_t i = all*params->ith/params->nth; i < all*(params->ith + 1)/params->nth; ++i) {
        const int64_t matrix = i/rows, r = i % rows;
        const struct columns_side side = columns_side_at(x->type, (const char *) dst->src[3]->data + matrix*dst->src[3]->nb[1]);
        const char * at = (const char *) x->data + matrix*x->nb[2] + r/lanes*lanes*row_size;
        columns_decode_row(x->type, &side, at, lanes, (uint32_t) r, row);
        char * to = (char *) dst->data + r*sizeof(float);
        if (dst->op == GGML_OP_MUL_MAT_ID) {
            for (int64_t t = 0; t < ids->ne[1]; ++t) {
                for (int64_t u = 0; u < ids->ne[0]; ++u) {
                    if (*(const int32_t *) ((const char *) ids->data + u*ids->nb[0] + t*ids->nb[1]) == matrix) {
                        *(float *) (to + u*dst->nb[1] + t*dst->nb[2]) = exact_dot(row, (const char *) y->data + u % y->ne[1]*y->nb[1] + t*y->nb[2], x->ne[0]);
                    }
                }
            }
            continue;
        }
        for (int64_t i3 = 0; i3 < dst->ne[3]; ++i3) {
            for (int64_t i2 = matrix*repeats; i2 < (matrix + 1)*repeats; ++i2) {
                for (int64_t i1 = 0; i1 < dst->ne[1]; ++i1) {
                    *(float *) (to + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]) =
                        exact_dot(row, (const char *) y->data + i1*y->nb[1] + i2*y->nb[2] + i3*y->nb[3], x->ne[0]);
                }
            }
        }
    }
}
