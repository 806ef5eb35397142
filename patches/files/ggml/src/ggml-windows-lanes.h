// SPDX-License-Identifier: MIT
// The encoder of the window types for LANES blocks at once, one in each lane of a vector. Included by ggml-windows.c, with
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
#define GATHER(from, i)        ((ivec) _mm512_i32gather_epi32((__m512i) (i), (const void *) (from), 4))
#define PACK(slope, share)     (((slope) & 0xffff) | (share) << 16)
#define ADD(cost, x, share, e) ((ivec) _mm512_dpwssd_epi32((__m512i) (cost), (__m512i) (x), _mm512_set1_epi32(trellis->both[e])))
#define LEAST(a, b)            ((ivec) _mm512_min_epi32((__m512i) (a), (__m512i) (b)))
#define BELOW(a, b, yes, no)   ((ivec) _mm512_mask_mov_epi32((__m512i) (no), \
                                       _mm512_cmplt_epi32_mask((__m512i) (a), (__m512i) (b)), (__m512i) (yes)))
#elif LANES == 8
#define GATHER(from, i)        NAMED(gather)(from, i) // many processors are no quicker at it
#define PACK(slope, share)     (((slope) & 0xffff) | (share) << 16)
#define ADD(cost, x, share, e) ((cost) + (ivec) _mm256_madd_epi16((__m256i) (x), _mm256_set1_epi32(trellis->both[e])))
#define LEAST(a, b)            ((ivec) _mm256_min_epi32((__m256i) (a), (__m256i) (b)))
#define BELOW(a, b, yes, no)   ((ivec) _mm256_blendv_epi8((__m256i) (no), (__m256i) (yes), \
                                       _mm256_cmpgt_epi32((__m256i) (b), (__m256i) (a))))
#else
#define GATHER(from, i)        NAMED(gather)(from, i)
#if defined(__SSE2__)
#define PACK(slope, share)     (((slope) & 0xffff) | (share) << 16)
#define ADD(cost, x, share, e) ((cost) + (ivec) _mm_madd_epi16((__m128i) (x), _mm_set1_epi32(trellis->both[e])))
#else
#define PACK(slope, share)     ((slope) - (ivec) ALL(ROUND))
#define ADD(cost, x, share, e) ((cost) + (x)*trellis->twice[e] + (share)*trellis->square[e])
#endif
#if defined(__aarch64__)
#define LEAST(a, b)            ((ivec) vminq_s32((int32x4_t) (a), (int32x4_t) (b)))
#else
#define LEAST(a, b)            BELOW(a, b, a, b)
#endif
#define BELOW(a, b, yes, no)   SELECT((a) < (b), yes, no)
#endif
#define SELECT(mask, yes, no)  ((ivec) (((ivec) (yes) & (mask)) | ((ivec) (no) & ~(mask))))
#define LOWER(a, b)            ((vec) SELECT((a) < (b), a, b))
#define HIGHER(a, b)           ((vec) SELECT((a) > (b), a, b))
#define ALL(x)                 ((vec) {0} + (x))
#define EACH(x)                ((ivec) {0} + (x))

#if LANES < 16
static SPLITQ_INLINE ivec NAMED(gather)(const void * from, ivec i) {
    int32_t found[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        memcpy(&found[lane], (const char *) from + 4*i[lane], 4);
    }
    memcpy(&i, found, sizeof(i));
    return i;
}
#endif

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

static SPLITQ_INLINE ivec NAMED(limited)(ivec code, int least, int most) {
    return SELECT(code < least, EACH(least), SELECT(code > most, EACH(most), code));
}

// Scale i of those that are tried around the base.
static SPLITQ_INLINE ivec NAMED(tried)(ivec base, int i, const splitq_trellis * trellis, const int bits, const bool open) {
    if (open) {
        const ivec number = NAMED(limited)(((base - trellis->base) >> trellis->shift) + (i - STEPS_DOWN), 0, (1 << (1 + bits)) - 1);
        return trellis->base + (number << trellis->shift);
    }
    return NAMED(limited)(base + (i - STEPS_DOWN), 1, 127);
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

// The weights, times their shares, at a scale.
static SPLITQ_INLINE void NAMED(place)(const vec * w, const ivec * share, vec d, ivec * x) {
    const vec inv = ALL(-1.0f)/d;
    for (int i = 0; i < SPLITQ_QK; ++i) {
        x[i] = PACK((ivec) (w[i]*inv + ALL(ROUND)), share[i]);
    }
    (void) share;
}

// One weight on, from the end of the chain to its beginning: the least cost of each state.
static SPLITQ_INLINE void NAMED(forward)(ivec * cost, ivec x, ivec share, const splitq_trellis * trellis, const int bits) {
    const int states = SPLITQ_INDICES(bits) >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        ivec least[4];
        SPLITQ_UNROLL_WAYS
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
    const int states = SPLITQ_INDICES(bits) >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        ivec least[4];
        SPLITQ_UNROLL_WAYS
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
static SPLITQ_INLINE void NAMED(forward_ways)(ivec * cost, ivec * way, ivec x, ivec share,
                                             const splitq_trellis * trellis, const int bits) {
    const int states = SPLITQ_INDICES(bits) >> bits, ways = 1 << bits;
    ivec next[16];
    SPLITQ_UNROLL
    for (int s = 0; s < states; ++s) {
        next[s] = ADD(cost[s >> bits], x, share, s);
        way[s]  = EACH(0);
        SPLITQ_UNROLL_WAYS
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

// LANES blocks, one after another at x, to blocks at y; importance NULL, or that of a row, in which each block begins at `start`.
static SPLITQ_INLINE void NAMED(encode_blocks)(const float * x, uint8_t * y, const float * importance, ivec start,
                                              const splitq_trellis * trellis, const int bits, const bool open) {
    const int states = SPLITQ_INDICES(bits) >> bits, chains = bits >= 4 ? 2 : 1, length = SPLITQ_QK/chains;
    ivec lanes;
    for (int lane = 0; lane < LANES; ++lane) {
        lanes[lane] = lane;
    }
    // All in the order of the chains
    vec  w[SPLITQ_QK], weight[SPLITQ_QK], ratio[SPLITQ_QK], shared[SPLITQ_QK], part[SPLITQ_QK], sum[SPLITQ_QK];
    ivec share[SPLITQ_QK], at[SPLITQ_QK];

    vec most = ALL(0.0f);
    for (int i = 0; i < SPLITQ_QK; ++i) {
        const vec limit = ALL(127*SPLITQ_SCALE_MAX);
        w[i] = (vec) GATHER(x + column(bits, i), lanes*SPLITQ_QK);
        w[i] = HIGHER(LOWER(w[i], limit), -limit) + ALL(0.0f);
        weight[i] = ALL(1.0f);
        if (importance) {
            weight[i] = (vec) GATHER(importance + column(bits, i), start);
        }
        most = HIGHER(most, weight[i]);
    }
    const ivec none = most <= 0; // all of no importance are alike
    most = (vec) SELECT(none, ALL(1.0f), most);
    for (int i = 0; i < SPLITQ_QK; ++i) {
        weight[i] = (vec) SELECT(none, ALL(1.0f), weight[i]);
        ratio[i]  = weight[i]/most;
        sum[i]    = ratio[i];
        part[i]   = ratio[i]*(w[i]*w[i]*(w[i]*w[i]));
    }
    const vec  power = NAMED(tree)(part)/NAMED(tree)(sum);
    const ivec base  = NAMED(scale_below)(NAMED(root)(NAMED(root)(power))/ALL(trellis->spread));
    const vec  small = NAMED(scale)(NAMED(tried)(base, 0, trellis, bits, open)), reach = small*ALL(REACH);
    most = ALL(0.0f);
    for (int i = 0; i < SPLITQ_QK; ++i) {
        shared[i] = HIGHER(LOWER(w[i], reach), -reach);
        most      = HIGHER(most, ratio[i]*HIGHER(shared[i], -shared[i]));
    }
    const vec unit = ALL(SLOPE)/HIGHER(most/small, ALL(LEAST_SLOPE));
    for (int i = 0; i < SPLITQ_QK; ++i) {
        const vec rounded = HIGHER(ratio[i]*unit + ALL(ROUND), ALL(ROUND + 1));
        share[i]   = (ivec) rounded - (ivec) ALL(ROUND);
        shared[i] *= rounded - ALL(ROUND);
    }

    // Chains with free ends at each scale
    ivec tried[TRIED], free[TRIED], last[TRIED][16];
    vec  error[TRIED];
    for (int i = 0; i < TRIED; ++i) {
        tried[i] = NAMED(tried)(base, i/2, trellis, bits, open) + i%2*128;
        const vec d = NAMED(scale)(tried[i]);
        NAMED(place)(shared, share, d, at);
        free[i] = EACH(0);
        for (int h = 0; h < chains; ++h) {
            ivec cost[16];
            SPLITQ_UNROLL
            for (int s = 0; s < states; ++s) { cost[s] = EACH(0); }
            for (int p = length - 1; p >= 0; --p) {
                NAMED(forward)(cost, at[h*length + p], share[h*length + p], trellis, bits);
            }
            memcpy(last[i] + h*states, cost, states*sizeof(ivec));
            free[i] += NAMED(least)(cost, states);
        }
        error[i] = __builtin_convertvector(free[i], vec)*(d*d);
    }

    // The most promising ones closed
    ivec best = EACH(0), ends[2] = { EACH(0), EACH(0) };
    vec  least = ALL(INFINITY);
    for (int i = 0; open && i < TRIED; ++i) {
        const ivec better = error[i] < least;
        least = (vec) SELECT(better, error[i], least);
        best  = SELECT(better, tried[i], best);
    }
    for (int kept = 0; !open && kept < trellis->kept; ++kept) {
        ivec which = EACH(0);
        vec  first = error[0];
        for (int i = 1; i < TRIED; ++i) {
            const ivec lower = error[i] < first;
            which = SELECT(lower, EACH(i), which);
            first = (vec) SELECT(lower, error[i], first);
        }
        const ivec scale = GATHER(tried, which*LANES + lanes), before = GATHER(free, which*LANES + lanes);
        ivec end[16];
        for (int s = 0; s < chains*states; ++s) {
            end[s] = GATHER(last, (which*16 + s)*LANES + lanes);
        }
        for (int i = 0; i < TRIED; ++i) {
            error[i] = (vec) SELECT(which == i, (ivec) ALL(INFINITY), error[i]);
        }
        const vec d = NAMED(scale)(scale);
        NAMED(place)(shared, share, d, at);
        ivec closed = -before, state[2] = { EACH(0), EACH(0) };
        for (int h = 0; h < chains; ++h) {
            ivec cost[16];
            SPLITQ_UNROLL
            for (int s = 0; s < states; ++s) { cost[s] = EACH(0); }
            for (int p = 0; p < length; ++p) {
                NAMED(backward)(cost, at[h*length + p], share[h*length + p], trellis, bits);
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
    NAMED(place)(shared, share, d, at);
    for (int h = 0; h < chains; ++h) {
        ivec cost[16];
        for (int s = 0; s < states; ++s) { cost[s] = SELECT(ends[h] == s, EACH(0), EACH(open ? 0 : NEVER)); }
        for (int p = length - 1; p >= 0; --p) {
            const int i = h*length + p;
            NAMED(forward_ways)(cost, way[i], at[i], share[i], trellis, bits);
        }
        ivec lowest = cost[0];
        for (int s = 1; open && s < states; ++s) {
            ends[h] = BELOW(cost[s], lowest, EACH(s), ends[h]);
            lowest  = LEAST(lowest, cost[s]);
        }
    }
    ivec word[6] = { EACH(0), EACH(0), EACH(0), EACH(0), EACH(0), EACH(0) };
    for (int h = 0; h < chains; ++h) {
        ivec state = ends[h];
        for (int p = 0; p < length; ++p) {
            const int  i = h*length + p, at = bits >= 4 ? 4*i : 2*i, c = column(bits, i), k = c%8;
            const ivec e = GATHER(way[i], state*LANES + lanes)*states + state;
            word[at/32] |= (e & (bits >= 4 ? 15 : 3)) << at%32;
            if (bits == 6) {
                word[4 + k/4] |= (e >> 4 & 3) << (k%4*8 + c/8*2);
            } else if (bits == 5) {
                word[4] |= (e >> 4 & 1) << (4*k + c/8);
            } else if (bits == 3) {
                word[2] |= (e >> 2 & 1) << i;
            }
            const vec level = __builtin_convertvector(GATHER(trellis->twice, e), vec)*ALL(0.5f), r = w[i] - d*level;
            part[i] = weight[i]*r*r;
            sum[i]  = weight[i]*w[i]*w[i];
            state = e >> bits;
        }
        ends[h] = state; // what follows
    }
    ivec worth = NAMED(tree)(part) < NAMED(tree)(sum);
    const int words = bits;
    if (open) {
        const ivec number = ((best & 127) - trellis->base) >> trellis->shift;
        const ivec turned = ends[0] >> 2 | (ends[0] & 3) << 1; // the bit that follows qh first
        best  = (best & 128) | number << (6 - bits) | SELECT(EACH(bits == 3 ? -1 : 0), turned, ends[0]);
        worth = EACH(-1);
    }
    int32_t   out[7][LANES];
    best &= worth;
    memcpy(out[6], &best, sizeof(best));
    for (int i = 0; i < words; ++i) {
        word[i] &= worth;
        memcpy(out[i], &word[i], sizeof(word[i]));
    }
    for (int lane = 0; lane < LANES; ++lane, y += 4*words + 1) {
        for (int i = 0; i < words; ++i) {
            memcpy(y + 4*i, &out[i][lane], 4);
        }
        y[4*words] = out[6][lane];
    }
}

static void NAMED(encode)(const float * x, uint8_t * y, int64_t n, int64_t row_blocks, const float * imatrix,
                          const splitq_trellis * trellis, const int bits) {
    const int size = 4*bits + 1;
    for (int64_t done = 0; done < n; done += LANES, x += LANES*SPLITQ_QK, y += LANES*size) {
        const int count = n - done < LANES ? n - done : LANES;
        float     in[LANES*SPLITQ_QK] = { 0 };
        uint8_t   out[LANES*25];
        int32_t   starts[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            starts[lane] = (done + lane)%row_blocks*SPLITQ_QK;
        }
        ivec start;
        memcpy(&start, starts, sizeof(start));
        if (count < LANES) {
            memcpy(in, x, count*SPLITQ_QK*sizeof(float));
        }
        const float * from = count < LANES ? in : x;
        uint8_t * to = count < LANES ? out : y;
        switch (trellis->base ? -bits : bits) { // constants, so that each gets code of its own
            case 6:  NAMED(encode_blocks)(from, to, imatrix, start, trellis, 6, false); break;
            case 5:  NAMED(encode_blocks)(from, to, imatrix, start, trellis, 5, false); break;
            case 4:  NAMED(encode_blocks)(from, to, imatrix, start, trellis, 4, false); break;
            case 3:  NAMED(encode_blocks)(from, to, imatrix, start, trellis, 3, false); break;
            case 2:  NAMED(encode_blocks)(from, to, imatrix, start, trellis, 2, false); break;
            case -3: NAMED(encode_blocks)(from, to, imatrix, start, trellis, 3, true);  break;
            default: NAMED(encode_blocks)(from, to, imatrix, start, trellis, 2, true);  break;
        }
        if (count < LANES) {
            memcpy(y, out, count*size);
        }
    }
}

#undef LANES
#undef NAMED_
#undef NAMED__
#undef NAMED
#undef vec
#undef ivec
#undef GATHER
#undef PACK
#undef ADD
#undef LEAST
#undef BELOW
#undef SELECT
#undef LOWER
#undef HIGHER
#undef ALL
#undef EACH
