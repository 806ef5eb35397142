// SPDX-License-Identifier: MIT
// The encoder of sq4w, sq3w and sq2w for LANES blocks at once, one in each lane of a vector. Included by ggml-windows.c, with
// LANES 16 for AVX-512 VNNI, 8 for AVX2 and 4 for the others.

#define NAMED_(name, lanes) windows_##name##_##lanes
#define NAMED__(name, lanes) NAMED_(name, lanes)
#define NAMED(name) NAMED__(name, LANES)
#define vec  NAMED(vec)
#define ivec NAMED(ivec)
typedef float   vec  __attribute__((vector_size(4*LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4*LANES), may_alias));

// ADD(cost, x, share, e): the cost of taking edge e; x is what PACK makes of a weight's slope and share.
#if LANES == 16
#define PACK(slope, share)     (((slope) & 0xffff) | (share) << 16)
#define ADD(cost, x, share, e) ((ivec) _mm512_dpwssd_epi32((__m512i) (cost), (__m512i) (x), _mm512_set1_epi32(trellis->both[e])))
#define LEAST(a, b)            ((ivec) _mm512_min_epi32((__m512i) (a), (__m512i) (b)))
#define BELOW(a, b, yes, no)   ((ivec) _mm512_mask_mov_epi32((__m512i) (no), _mm512_cmplt_epi32_mask((__m512i) (a), (__m512i) (b)), (__m512i) (yes)))
#elif LANES == 8
#define PACK(slope, share)     (((slope) & 0xffff) | (share) << 16)
#define ADD(cost, x, share, e) ((cost) + (ivec) _mm256_madd_epi16((__m256i) (x), _mm256_set1_epi32(trellis->both[e])))
#define LEAST(a, b)            ((ivec) _mm256_min_epi32((__m256i) (a), (__m256i) (b)))
#define BELOW(a, b, yes, no)   ((ivec) _mm256_blendv_epi8((__m256i) (no), (__m256i) (yes), _mm256_cmpgt_epi32((__m256i) (b), (__m256i) (a))))
#else
#define PACK(slope, share)     (slope)
#define ADD(cost, x, share, e) ((cost) + (x)*trellis->twice[e] + (share)*trellis->square[e])
#define BELOW(a, b, yes, no)   SELECT((a) < (b), yes, no)
#if defined(__aarch64__)
#define LEAST(a, b)            ((ivec) vminq_s32((int32x4_t) (a), (int32x4_t) (b)))
#else
#define LEAST(a, b)            BELOW(a, b, a, b)
#endif
#endif
#define SELECT(mask, yes, no)  ((ivec) (((ivec) (yes) & (mask)) | ((ivec) (no) & ~(mask))))
#define LOWER(a, b)            ((vec) SELECT((a) < (b), a, b))
#define HIGHER(a, b)           ((vec) SELECT((a) > (b), a, b))
#define ALL(x)                 ((vec) {0} + (x))
#define EACH(x)                ((ivec) {0} + (x))

static SPLITQ_INLINE vec NAMED(tree)(vec * v) {
    SPLITQ_UNROLL
    for (int half = SPLITQ_QK/2; half > 0; half /= 2) {
        SPLITQ_UNROLL
        for (int j = 0; j < half; ++j) {
            v[j] += v[j + half];
        }
    }
    return v[0];
}

// What splitq_scale holds for 0 to 255.
static SPLITQ_INLINE vec NAMED(scale)(ivec byte) {
    const ivec code = byte & 127, normal = (code + (((127 - 18) << 3) - 8)) << 20;
    const vec  small = __builtin_convertvector(code, vec)*ALL(SPLITQ_SCALE_ULP);
    return (vec) (SELECT(code < 8, (ivec) small, normal) | byte >> 7 << 31);
}

// scale_below of ggml-splitq.c.
static SPLITQ_INLINE ivec NAMED(scale_below)(vec y) {
    const ivec small = __builtin_convertvector(LOWER(y, ALL(8*SPLITQ_SCALE_ULP))*ALL(1/SPLITQ_SCALE_ULP), ivec);
    const ivec normal = ((ivec) y >> 20) - (((127 - 18) << 3) - 8);
    return SELECT(y < ALL(8*SPLITQ_SCALE_ULP), small, SELECT(normal < 127, normal, EACH(127)));
}

static SPLITQ_INLINE vec NAMED(root)(vec x) {
    for (int lane = 0; lane < LANES; ++lane) {
        x[lane] = sqrtf(x[lane]);
    }
    return x;
}

static SPLITQ_INLINE ivec NAMED(least)(const ivec * cost, const int n) {
    ivec least = cost[0];
    SPLITQ_UNROLL
    for (int s = 1; s < n; ++s) {
        least = LEAST(least, cost[s]);
    }
    return least;
}

// The weights at a scale, by chain, as ADD wants them.
static SPLITQ_INLINE void NAMED(place)(const vec * w, const ivec * share, vec d, const int bits, ivec * x) {
    const vec inv = ALL(-1.0f)/d;
    for (int i = 0; i < SPLITQ_QK; ++i) {
        const int  c = column(bits, i);
        const vec  level = HIGHER(LOWER(w[c]*inv, ALL(REACH)), ALL(-REACH));
        const vec  slope = level*__builtin_convertvector(share[c], vec);
        x[i] = PACK((ivec) (slope + ALL(ROUND)) - (ivec) ALL(ROUND), share[c]);
    }
}

// One weight on, from the end of the chain to its beginning: the least cost of each state.
static SPLITQ_INLINE void NAMED(forward)(ivec * cost, ivec x, ivec share, const splitq_trellis * trellis, const int bits) {
    const int states = 64 >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        ivec least[4];
        SPLITQ_UNROLL
        for (int k = 0; k < ways; ++k) {
            const int  e = s + k*states;
            const ivec c = ADD(cost[e >> bits], x, share, e);
            least[k & 3] = k < 4 ? c : LEAST(least[k & 3], c);
        }
        next[s] = LEAST(LEAST(least[0], least[1]), LEAST(least[2], least[3]));
    }
    memcpy(cost, next, states*sizeof(ivec));
    (void) share;
}

// The same the other way: the least cost from each state to the beginning of the chain.
static SPLITQ_INLINE void NAMED(backward)(ivec * cost, ivec x, ivec share, const splitq_trellis * trellis, const int bits) {
    const int states = 64 >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        ivec least[4];
        SPLITQ_UNROLL
        for (int k = 0; k < ways; ++k) {
            const int  e = s << bits | k;
            const ivec c = ADD(cost[e % states], x, share, e);
            least[k & 3] = k < 4 ? c : LEAST(least[k & 3], c);
        }
        next[s] = LEAST(LEAST(least[0], least[1]), LEAST(least[2], least[3]));
    }
    memcpy(cost, next, states*sizeof(ivec));
    (void) share;
}

// forward, which tells also the first of the best ways to each state.
static SPLITQ_INLINE void NAMED(forward_ways)(ivec * cost, ivec * way, ivec x, ivec share, const splitq_trellis * trellis, const int bits) {
    const int states = 64 >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        next[s] = ADD(cost[s >> bits], x, share, s);
        way[s]  = EACH(0);
        SPLITQ_UNROLL
        for (int k = 1; k < ways; ++k) {
            const int  e = s + k*states;
            const ivec c = ADD(cost[e >> bits], x, share, e);
            way[s]  = BELOW(c, next[s], EACH(k), way[s]);
            next[s] = LEAST(next[s], c);
        }
    }
    memcpy(cost, next, states*sizeof(ivec));
    (void) share;
}

// LANES blocks, one after another at x, to blocks at y; importance: each block's columns.
static SPLITQ_INLINE void NAMED(encode_blocks)(const float * x, uint8_t * y, const float ** importance, const splitq_trellis * trellis, const int bits) {
    const int states = 64 >> bits, chains = bits == 4 ? 2 : 1, length = SPLITQ_QK/chains;
    float across[2][SPLITQ_QK][LANES];
    vec  w[SPLITQ_QK], weight[SPLITQ_QK], part[SPLITQ_QK];
    ivec share[SPLITQ_QK], at[SPLITQ_QK];

    for (int lane = 0; lane < LANES; ++lane) {
        for (int j = 0; j < SPLITQ_QK; ++j) {
            across[0][j][lane] = x[lane*SPLITQ_QK + j];
            across[1][j][lane] = importance[lane][j];
        }
    }
    memcpy(w,      across[0], sizeof(w));
    memcpy(weight, across[1], sizeof(weight));
    vec most = ALL(0.0f);
    for (int j = 0; j < SPLITQ_QK; ++j) {
        const vec limit = ALL(127*SPLITQ_SCALE_MAX);
        w[j] = HIGHER(LOWER(w[j], limit), -limit) + ALL(0.0f);
        most = HIGHER(most, weight[j]);
    }
    for (int j = 0; j < SPLITQ_QK; ++j) {
        const vec rounded = HIGHER(weight[j]/most*ALL(UNIT) + ALL(ROUND), ALL(ROUND + 1));
        share[j] = (ivec) rounded - (ivec) ALL(ROUND);
    }

    // A scale to begin with
    vec sum[SPLITQ_QK];
    for (int j = 0; j < SPLITQ_QK; ++j) {
        sum[j]  = __builtin_convertvector(share[j], vec);
        part[j] = sum[j]*(w[j]*w[j]*(w[j]*w[j]));
    }
    const vec  power = NAMED(tree)(part)/NAMED(tree)(sum);
    const ivec base  = NAMED(scale_below)(NAMED(root)(NAMED(root)(power))/ALL(trellis->spread));

    // Chains with free ends at each scale
    ivec tried[TRIED], free[TRIED], last[TRIED][16];
    vec  error[TRIED];
    for (int i = 0; i < TRIED; ++i) {
        const ivec near = base + (i/2 - STEPS_DOWN), code = SELECT(near < 1, EACH(1), SELECT(near > 127, EACH(127), near));
        tried[i] = code + i%2*128;
        const vec d = NAMED(scale)(tried[i]);
        NAMED(place)(w, share, d, bits, at);
        free[i] = EACH(0);
        for (int h = 0; h < chains; ++h) {
            ivec cost[16];
            SPLITQ_UNROLL
            for (int s = 0; s < states; ++s) { cost[s] = EACH(0); }
            for (int p = length - 1; p >= 0; --p) {
                NAMED(forward)(cost, at[h*length + p], share[column(bits, h*length + p)], trellis, bits);
            }
            memcpy(last[i] + h*states, cost, states*sizeof(ivec));
            free[i] += NAMED(least)(cost, states);
        }
        error[i] = __builtin_convertvector(free[i], vec)*(d*d);
    }

    // The most promising ones closed
    ivec best = EACH(0), ends[2] = { EACH(0), EACH(0) };
    vec  least = ALL(INFINITY);
    for (int kept = 0; kept < KEPT; ++kept) {
        ivec which = EACH(0);
        vec  first = error[0];
        for (int i = 1; i < TRIED; ++i) {
            const ivec lower = error[i] < first;
            which = SELECT(lower, EACH(i), which);
            first = (vec) SELECT(lower, error[i], first);
        }
        ivec scale = EACH(0), before = EACH(0), end[16];
        int32_t ended[16][LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int i = which[lane];
            error[i][lane] = INFINITY;
            scale[lane]    = tried[i][lane];
            before[lane]   = free[i][lane];
            for (int s = 0; s < chains*states; ++s) {
                ended[s][lane] = last[i][s][lane];
            }
        }
        memcpy(end, ended, sizeof(end));
        const vec d = NAMED(scale)(scale);
        NAMED(place)(w, share, d, bits, at);
        ivec closed = -before, state[2] = { EACH(0), EACH(0) };
        for (int h = 0; h < chains; ++h) {
            ivec cost[16];
            SPLITQ_UNROLL
            for (int s = 0; s < states; ++s) { cost[s] = EACH(0); }
            for (int p = 0; p < length; ++p) {
                NAMED(backward)(cost, at[h*length + p], share[column(bits, h*length + p)], trellis, bits);
            }
            ivec lowest = cost[0] + end[h*states];
            for (int s = 1; s < states; ++s) {
                const ivec c = cost[s] + end[h*states + s];
                state[h] = BELOW(c, lowest, EACH(s), state[h]);
                lowest   = LEAST(lowest, c);
            }
            closed += lowest;
        }
        const vec  total  = __builtin_convertvector(closed, vec)*(d*d);
        const ivec better = total < least;
        least   = (vec) SELECT(better, total, least);
        best    = SELECT(better, scale, best);
        ends[0] = SELECT(better, state[0], ends[0]);
        ends[1] = SELECT(better, state[1], ends[1]);
    }

    // The best one's path
    const vec d = NAMED(scale)(best);
    ivec way[SPLITQ_QK][16];
    NAMED(place)(w, share, d, bits, at);
    for (int h = 0; h < chains; ++h) {
        ivec cost[16];
        for (int s = 0; s < states; ++s) { cost[s] = SELECT(ends[h] == s, EACH(0), EACH(NEVER)); }
        for (int p = length - 1; p >= 0; --p) {
            const int i = h*length + p;
            NAMED(forward_ways)(cost, way[i], at[i], share[column(bits, i)], trellis, bits);
        }
    }
    uint64_t low[LANES][2] = { 0 };
    uint32_t high[LANES] = { 0 };
    for (int lane = 0; lane < LANES; ++lane) {
        for (int h = 0; h < chains; ++h) {
            int state = ends[h][lane];
            for (int p = 0; p < length; ++p) {
                const int i = h*length + p, e = state + way[i][state][lane]*states;
                low[lane][h] |= (uint64_t) (e & (bits == 4 ? 15 : 3)) << p*64/length;
                high[lane]   |= (uint32_t) (bits == 3 ? e >> 2 & 1 : 0) << p;
                across[0][column(bits, i)][lane] = trellis->twice[e];
                state = e >> bits;
            }
        }
    }
    memcpy(part, across[0], sizeof(part));
    for (int j = 0; j < SPLITQ_QK; ++j) {
        const vec r = w[j] - d*(part[j]*ALL(0.5f));
        part[j] = weight[j]*r*r;
        sum[j]  = weight[j]*w[j]*w[j];
    }
    const ivec worth = NAMED(tree)(part) < NAMED(tree)(sum);
    for (int lane = 0; lane < LANES; ++lane) {
        const int words = bits == 4 ? 4 : bits;
        memset(y, 0, 4*words + 1);
        if (worth[lane]) {
            memcpy(y, low[lane], 8*chains);
            if (bits == 3) {
                memcpy(y + 8, &high[lane], 4);
            }
            y[4*words] = best[lane];
        }
        y += 4*words + 1;
    }
}

static void NAMED(encode)(const float * x, uint8_t * y, int64_t n, int64_t row_blocks, const float * imatrix, const splitq_trellis * trellis, const int bits) {
    const int size = 4*(bits == 4 ? 4 : bits) + 1;
    for (int64_t done = 0; done < n; done += LANES) {
        const int     count = n - done < LANES ? n - done : LANES;
        const float * importance[LANES], * from = x + done*SPLITQ_QK;
        uint8_t     * to = y + done*size, out[LANES*17];
        float         in[LANES*SPLITQ_QK] = { 0 };
        for (int lane = 0; lane < LANES; ++lane) {
            importance[lane] = block_weight(imatrix && lane < count ? imatrix + (done + lane)%row_blocks*SPLITQ_QK : NULL);
        }
        if (count < LANES) {
            memcpy(in, from, count*SPLITQ_QK*sizeof(float));
            from = in;
            to   = out;
        }
        switch (bits) { // constants, so that each gets code of its own
            case 4:  NAMED(encode_blocks)(from, to, importance, trellis, 4); break;
            case 3:  NAMED(encode_blocks)(from, to, importance, trellis, 3); break;
            default: NAMED(encode_blocks)(from, to, importance, trellis, 2); break;
        }
        if (count < LANES) {
            memcpy(y + done*size, out, count*size);
        }
    }
}

#undef LANES
#undef NAMED_
#undef NAMED__
#undef NAMED
#undef vec
#undef ivec
#undef PACK
#undef ADD
#undef LEAST
#undef BELOW
#undef SELECT
#undef LOWER
#undef HIGHER
#undef ALL
#undef EACH
