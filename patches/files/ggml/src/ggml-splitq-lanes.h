// SPDX-License-Identifier: MIT
// encode_block for LANES blocks at once, one in each lane of a vector: the same bytes, several times sooner. Included by
// ggml-splitq.c, with LANES 16 for AVX-512, 8 for AVX2 and 4 for NEON.
//
// Sums are added in the order of tree_sum. Multiply-adds are fused only where the product is exact by itself: a scale has
// 4 significant bits and a level 7.

#if LANES == 16
#define NAMED(name) name##_16
#define vec  __m512
#define ivec ivec16
#define FLOOR(x)              ((ivec) _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))
#define CEIL(x)               ((ivec) _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC))
#define LOOKUP(table, i)      _mm512_permutexvar_ps((__m512i) (i), _mm512_loadu_ps(table)) // only an index' low 4 bits count
#define ABOVE(a, b, yes, no)  _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes)
#define FMA(a, b, c)          _mm512_fmadd_ps(a, b, c)
#define FNMA(a, b, c)         _mm512_fnmadd_ps(a, b, c)
#define LEAST(a, b)             _mm512_min_ps(a, b)
#define MOST(a, b)             _mm512_max_ps(a, b)
#elif LANES == 8
#define NAMED(name) name##_8
#define vec  __m256
#define ivec ivec8
#define FLOOR(x)              ((ivec) _mm256_cvtps_epi32(_mm256_floor_ps(x)))
#define CEIL(x)               ((ivec) _mm256_cvtps_epi32(_mm256_ceil_ps(x)))
#define HALF(table, i)        _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i) (i))
#define LOOKUP(table, i)      _mm256_blendv_ps(HALF(table, i), HALF((table) + 8, i), (__m256) ((i) << 28))
#define ABOVE(a, b, yes, no)  _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ))
#define FMA(a, b, c)          _mm256_fmadd_ps(a, b, c)
#define FNMA(a, b, c)         _mm256_fnmadd_ps(a, b, c)
#define LEAST(a, b)             _mm256_min_ps(a, b)
#define MOST(a, b)            _mm256_max_ps(a, b)
#else
#define NAMED(name) name##_4
#define vec  float32x4_t
#define ivec ivec4
#define FLOOR(x)              ((ivec) vcvtmq_s32_f32(x))
#define CEIL(x)               ((ivec) vcvtpq_s32_f32(x))
#define BYTES(i)              vreinterpretq_u8_s32((int32x4_t) (((i) & 15)*0x04040404 + 0x03020100))
#define LOOKUP(table, i)      vreinterpretq_f32_u8(vqtbl4q_u8(vld1q_u8_x4((const uint8_t *) (table)), BYTES(i)))
#define ABOVE(a, b, yes, no)  vbslq_f32(vcgtq_f32(a, b), yes, no)
#define FMA(a, b, c)          vfmaq_f32(c, a, b)
#define FNMA(a, b, c)         vfmsq_f32(c, a, b)
#define LEAST(a, b)           vminq_f32(a, b)
#define MOST(a, b)            vmaxq_f32(a, b)
#endif
#define ALL(x) ((vec) {0} + (x))

typedef int ivec __attribute__((vector_size(4*LANES), may_alias));

static SPLITQ_INLINE vec NAMED(tree)(vec * v, int n) {
    SPLITQ_UNROLL
    for (int half = n/2; half > 0; half /= 2) {
        SPLITQ_UNROLL
        for (int j = 0; j < half; ++j) {
            v[j] += v[j + half];
        }
    }
    return v[0];
}

// Squared errors of all blocks with the scales d, and with -d, where the same steps are taken with the signs turned.
static SPLITQ_INLINE void NAMED(errors)(const vec * w, const vec * weight, const splitq_book * book, vec d, vec * sum) {
    const splitq_buckets * b = &book->plain, * t = &book->turned;
    const vec inv = ALL(1.0f)/d, to_bucket = inv*ALL(1/SPLITQ_BUCKET);
    vec part[2][8];
    for (int j = 0; j < 8; ++j) {
        vec e[2][4];
        SPLITQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            const vec  x = w[j + 8*i], scaled = x*inv;
            const vec  place = MOST(LEAST(x*to_bucket, ALL(7.99f)), ALL(-7.99f));
            const ivec low = FLOOR(place), high = CEIL(place);
            const vec  level  = ABOVE(scaled, LOOKUP(b->middle, low), LOOKUP(b->upper, low), LOOKUP(b->lower, low));
            const vec  turned = ABOVE(LOOKUP(t->middle, high), scaled, LOOKUP(t->upper, high), LOOKUP(t->lower, high));
            const vec  r = FNMA(d, level, x), q = FMA(d, turned, x);
            e[0][i] = weight ? weight[j + 8*i]*r*r : r*r;
            e[1][i] = weight ? weight[j + 8*i]*q*q : q*q;
        }
        part[0][j] = NAMED(tree)(e[0], 4);
        part[1][j] = NAMED(tree)(e[1], 4);
    }
    sum[0] = NAMED(tree)(part[0], 8);
    sum[1] = NAMED(tree)(part[1], 8);
}

// The scale of each index, 0 to 127: what splitq_scale holds.
static SPLITQ_INLINE vec NAMED(scale)(ivec code) {
    const ivec normal = (code + (((127 - 18) << 3) - 8)) << 20;
    const vec  number = __builtin_convertvector(code, vec);
    return ABOVE(ALL(8.0f), number, number*ALL(SPLITQ_SCALE_ULP), (vec) normal);
}

// LANES blocks, one after another at x, to blocks of 4*words + 1 bytes at y; importance: each block's columns, or NULL.
static SPLITQ_INLINE void NAMED(encode_blocks)(const float * x, uint8_t * y, const float ** importance, const splitq_book * book, int words) {
    float across[SPLITQ_QK][LANES];
    vec w[SPLITQ_QK], weight[SPLITQ_QK], part[SPLITQ_QK];
    for (int lane = 0; lane < LANES; ++lane) {
        for (int j = 0; j < SPLITQ_QK; ++j) {
            across[j][lane] = x[lane*SPLITQ_QK + j];
        }
    }
    memcpy(w, across, sizeof(w));
    for (int lane = 0; importance && lane < LANES; ++lane) {
        for (int j = 0; j < SPLITQ_QK; ++j) {
            across[j][lane] = importance[lane][j];
        }
    }
    memcpy(weight, across, sizeof(weight));
    vec largest = ALL(0.0f);
    for (int j = 0; j < SPLITQ_QK; ++j) {
        const vec limit = ALL(127*SPLITQ_SCALE_MAX);
        w[j]    = MOST(LEAST(w[j], limit), -limit) + ALL(0.0f);
        largest = MOST(largest, MOST(w[j], -w[j]));
        part[j] = importance ? weight[j]*w[j]*w[j] : w[j]*w[j];
    }
    const vec unit = largest/ALL(127.0f);
    const vec coarse = (vec) (((ivec) unit >> 20) - (((127 - 18) << 3) - 8));
    const vec fine   = (vec) FLOOR(unit*ALL(1/SPLITQ_SCALE_ULP));
    const ivec base  = (ivec) ABOVE(ALL(8*SPLITQ_SCALE_ULP), unit, fine, coarse);

    vec least = NAMED(tree)(part, SPLITQ_QK), best = (vec) (ivec) {0};
    for (int step = -book->steps_down; step <= book->steps_up; ++step) {
        const vec  number = MOST(LEAST(__builtin_convertvector(base + step, vec), ALL(127.0f)), ALL(1.0f));
        const ivec code   = FLOOR(number);
        vec sum[2];
        NAMED(errors)(w, importance ? weight : NULL, book, NAMED(scale)(code), sum);
        for (int mirror = 0; mirror < 2; ++mirror) {
            best  = ABOVE(least, sum[mirror], (vec) (code + 128*mirror), best);
            least = LEAST(least, sum[mirror]);
        }
    }
    const ivec chosen = (ivec) best;
    const vec  d = (vec) ((ivec) NAMED(scale)(chosen & 127) | chosen >> 7 << 31);
    const vec  inv = ALL(1.0f)/d, to_bucket = inv*ALL(1/SPLITQ_BUCKET);
    ivec packed[4] = { 0 };
    SPLITQ_UNROLL
    for (int j = 0; j < SPLITQ_QK; ++j) {
        const vec  scaled = w[j]*inv;
        const ivec low = FLOOR(MOST(LEAST(w[j]*to_bucket, ALL(7.99f)), ALL(-7.99f)));
        const vec  above = LOOKUP(book->upper, low), below = LOOKUP(book->lower, low);
        const ivec code  = (ivec) ABOVE(scaled, LOOKUP(book->plain.middle, low), above, below) & (chosen != 0);
        if (words == 4) {
            packed[j%16/4] |= code << (8*(j%4) + 4*(j/16));
        } else {
            packed[j%8/4] |= (code & 3) << (8*(j%4) + 2*(j/8));
            packed[2]     |= (code >> 2) << j;
        }
    }
    int32_t word[4][LANES], byte[LANES];
    memcpy(word, packed,  sizeof(word));
    memcpy(byte, &chosen, sizeof(byte));
    for (int lane = 0; lane < LANES; ++lane, y += 4*words + 1) {
        for (int i = 0; i < words; ++i) {
            memcpy(y + 4*i, &word[i][lane], 4);
        }
        y[4*words] = byte[lane];
    }
}

// As many of n blocks as fill vectors; returns their number. row_blocks: blocks of a row; imatrix: of a row, or NULL.
static int64_t NAMED(encode)(const float * x, uint8_t * y, int64_t n, int64_t row_blocks, const float * imatrix, const splitq_book * book) {
    int64_t done = 0;
    for (; done + LANES <= n; done += LANES, x += LANES*SPLITQ_QK, y += LANES*(4*book->words + 1)) {
        const float * importance[LANES];
        for (int lane = 0; imatrix && lane < LANES; ++lane) {
            importance[lane] = block_weight(imatrix + (done + lane) % row_blocks*SPLITQ_QK);
        }
        switch (book->words) { // constants, so that each gets code of its own
            case 4:  imatrix ? NAMED(encode_blocks)(x, y, importance, book, 4) : NAMED(encode_blocks)(x, y, NULL, book, 4); break;
            case 3:  imatrix ? NAMED(encode_blocks)(x, y, importance, book, 3) : NAMED(encode_blocks)(x, y, NULL, book, 3); break;
            default: imatrix ? NAMED(encode_blocks)(x, y, importance, book, 2) : NAMED(encode_blocks)(x, y, NULL, book, 2); break;
        }
    }
    return done;
}

#undef LANES
#undef NAMED
#undef vec
#undef ivec
#undef FLOOR
#undef CEIL
#undef HALF
#undef BYTES
#undef LOOKUP
#undef ABOVE
#undef FMA
#undef FNMA
#undef LEAST
#undef MOST
#undef ALL
