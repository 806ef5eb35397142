// SPDX-License-Identifier: MIT
// The sweep of ggml-windows-solve.c for 16 states in vectors of LANES: 16 for AVX-512, 8 for AVX2, 4 for NEON, 1 for the rest.
// The same operations in the same order, fused multiply-adds included: the same codes.

#define COUNT (16/LANES) // vectors for 16 states

// PERMUTE: of 16 states in t, those that i names; INDEX makes the i from their numbers.
#if LANES == 16
#define NAMED(name) name##_16
#define vec  __m512
#define ivec __m512i
#define ALL(x)              _mm512_set1_ps(x)
#define NUMBER(x)           _mm512_set1_epi32(x)
#define INDEX(p)            _mm512_loadu_si512(p)
#define PERMUTE(t, i)       _mm512_permutexvar_ps(i, (t)[0])
#define FMA(a, b, c)        _mm512_fmadd_ps(a, b, c)
#define MASK(a, b)          _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define mask                __mmask16
#define PICK(m, yes, no)    _mm512_mask_blend_ps(m, no, yes)
#define IPICK(m, yes, no)   _mm512_mask_blend_epi32(m, no, yes)
#elif LANES == 8
#define NAMED(name) name##_8
#define vec  __m256
#define ivec __m256i
#define ALL(x)              _mm256_set1_ps(x)
#define NUMBER(x)           _mm256_set1_epi32(x)
#define INDEX(p)            _mm256_loadu_si256((const __m256i *) (p))
#define HALF(t, i)          _mm256_permutevar8x32_ps(t, i)
#define PERMUTE(t, i)       _mm256_blendv_ps(HALF((t)[0], i), HALF((t)[1], i), (__m256) _mm256_slli_epi32(i, 28))
#define FMA(a, b, c)        _mm256_fmadd_ps(a, b, c)
#define MASK(a, b)          _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define mask                __m256
#define PICK(m, yes, no)    _mm256_blendv_ps(no, yes, m)
#define IPICK(m, yes, no)   ((__m256i) _mm256_blendv_ps((__m256) (no), (__m256) (yes), m))
#elif LANES == 4
#define NAMED(name) name##_4
#define vec  float32x4_t
#define ivec uint8x16_t
#define ALL(x)              vdupq_n_f32(x)
#define NUMBER(x)           vreinterpretq_u8_s32(vdupq_n_s32(x))
#define INDEX(p)            vreinterpretq_u8_s32(vmlaq_n_s32(vdupq_n_s32(0x03020100), vld1q_s32(p), 0x04040404))
#define PERMUTE(t, i)       vreinterpretq_f32_u8(vqtbl4q_u8(vld1q_u8_x4((const uint8_t *) (t)), i))
#define FMA(a, b, c)        vfmaq_f32(c, a, b)
#define MASK(a, b)          vcltq_f32(a, b)
#define mask                uint32x4_t
#define PICK(m, yes, no)    vbslq_f32(m, yes, no)
#define IPICK(m, yes, no)   vbslq_u8(vreinterpretq_u8_u32(m), yes, no)
#else
#define NAMED(name) name##_1
#define vec  float
#define ivec int32_t
#define ALL(x)              (x)
#define NUMBER(x)           (x)
#define INDEX(p)            (*(p))
#define PERMUTE(t, i)       ((t)[i])
#define FMA(a, b, c)        fmaf(a, b, c)
#define MASK(a, b)          ((a) < (b))
#define mask                int
#define PICK(m, yes, no)    ((m) ? (yes) : (no))
#define IPICK(m, yes, no)   ((m) ? (yes) : (no))
#endif

// Of two edges the one with the smaller total, the first where they are equal.
#define BETTER(total, value, number, place, a, b) do {                \
        const mask less = MASK(total[b], total[a]);                   \
        total[a]  = PICK(less, total[b], total[a]);                   \
        value[a]  = PICK(less, value[b], value[a]);                   \
        number[a] = IPICK(less, number[b], number[a]);                \
        place[a]  = IPICK(less, place[b], place[a]);                  \
    } while (0)

typedef struct { vec v[COUNT]; } NAMED(states);

// The paths of one chain for all states of the rows in the lanes. aims: of its columns, alike for all states, and overwritten;
// cost: what a state costs to begin in, and then what the path to it has cost; back: by which of the edges into it. push: NULL
// for none, else rows of SPLITQ_QK.
static SPLITQ_INLINE void NAMED(paths)(
        int bits, const int32_t (*from)[16], NAMED(states) * aims, const NAMED(states) * base, const NAMED(states) * values,
        const float * push, const float * costs, NAMED(states) * cost, int32_t (*back)[16]) {
    const int length = bits >= 4 ? 16 : 32;
    ivec before[WAYS][COUNT];
    for (int k = 0; k < 1 << bits; ++k) {
        for (int n = 0; n < COUNT; ++n) {
            before[k][n] = INDEX(from[k] + n*LANES);
        }
    }
    for (int i = 0; i < length; ++i) {
        NAMED(states) least, change;
        ivec edge[COUNT], way[COUNT];
        for (int n = 0; n < COUNT; ++n) {
            SPLITQ_UNROLL
            for (int k = 0; k < 1 << bits; k += 4) { // by fours, so that comparisons need not wait for each other
                vec  total[4], value[4];
                ivec number[4], place[4];
                vec  aim = PERMUTE(aims[i].v, before[k][n]), paid = PERMUTE(cost->v, before[k][n]);
                SPLITQ_UNROLL
                for (int e = 0; e < 4; ++e) {
                    if (bits < 4 && e > 0) { // of 16 edges or more into a state, 4 come from the same one
                        aim  = PERMUTE(aims[i].v, before[k + e][n]);
                        paid = PERMUTE(cost->v, before[k + e][n]);
                    }
                    const vec away = aim - values[k + e].v[n];
                    total[e]  = FMA(away*ALL(costs[i]), away, paid);
                    value[e]  = values[k + e].v[n];
                    number[e] = NUMBER(k + e);
                    place[e]  = before[k + e][n];
                }
                BETTER(total, value, number, place, 0, 1);
                BETTER(total, value, number, place, 2, 3);
                BETTER(total, value, number, place, 0, 2);
                if (k == 0) {
                    least.v[n]  = total[0];
                    change.v[n] = value[0];
                    edge[n]     = number[0];
                    way[n]      = place[0];
                } else {
                    const mask less = MASK(total[0], least.v[n]);
                    least.v[n]  = PICK(less, total[0], least.v[n]);
                    change.v[n] = PICK(less, value[0], change.v[n]);
                    edge[n]     = IPICK(less, number[0], edge[n]);
                    way[n]      = IPICK(less, place[0], way[n]);
                }
            }
            change.v[n] -= base[i].v[n];
        }
        memcpy(back[i], edge, sizeof(edge));
        *cost = least;
        for (int j = i + 1; push && j < length; ++j) {
            const vec pushed = ALL(push[i*SPLITQ_QK + j]);
            const NAMED(states) old = aims[j];
            for (int n = 0; n < COUNT; ++n) {
                aims[j].v[n] = FMA(pushed, change.v[n], PERMUTE(old.v, way[n]));
            }
        }
    }
}

// The best path of one chain for each row in the lanes, which begins and ends in `state`, or anywhere where that is NULL.
static void NAMED(path)(
        int bits, const int32_t (*from)[16], const NAMED(states) * aims, const NAMED(states) * base, const NAMED(states) * values,
        const float * push, const float * costs, const int * state, uint8_t (*edges)[ROWS], float * error) {
    const int length = bits >= 4 ? 16 : 32, states = SPLITQ_INDICES(bits) >> bits, rows = 16/states;
    NAMED(states) work[32], cost;
    float of[16];
    int32_t back[32][16];
    for (int lane = 0; lane < 16; ++lane) {
        of[lane] = state && state[lane/states] != lane%states ? SPLITQ_NEVER : 0.0f;
    }
    memcpy(&cost, of, sizeof(cost));
    memcpy(work, aims, length*sizeof(*work));
    switch (bits) { // constants, so that each gets code of its own
        case 6:  NAMED(paths)(6, from, work, base, values, push, costs, &cost, back); break;
        case 5:  NAMED(paths)(5, from, work, base, values, push, costs, &cost, back); break;
        case 4:  NAMED(paths)(4, from, work, base, values, push, costs, &cost, back); break;
        case 3:  NAMED(paths)(3, from, work, base, values, push, costs, &cost, back); break;
        default: NAMED(paths)(2, from, work, base, values, push, costs, &cost, back); break;
    }
    memcpy(of, &cost, sizeof(cost));
    for (int r = 0; r < rows; ++r) {
        int at = state ? state[r] : 0;
        for (int s = 1; !state && s < states; ++s) {
            at = of[r*states + s] < of[r*states + at] ? s : at;
        }
        error[r] = of[r*states + at];
        for (int i = length - 1; i >= 0; --i) {
            const int edge = back[i][r*states + at]*states + at;
            edges[i][r] = edge;
            at = edge >> bits;
        }
    }
}

// A block of the rows in the lanes at one scale each. states: of each chain and row, or NULL, where they are found if `close`.
static void NAMED(block)(
        int bits, const int32_t (*from)[16], const float * levels, const NAMED(states) * given, const NAMED(states) * base, const float * scale,
        const float * push, const float * costs, const int (*states)[ROWS], bool close, uint8_t (*edges)[ROWS], float * error) {
    const int length = bits >= 4 ? 16 : 32, n_states = SPLITQ_INDICES(bits) >> bits, rows = 16/n_states;
    NAMED(states) aims[32], values[WAYS];
    memcpy(aims, given, sizeof(aims));
    for (int k = 0; k < 1 << bits; ++k) {
        float of[16];
        for (int lane = 0; lane < 16; ++lane) {
            of[lane] = levels[k*n_states + lane%n_states]*scale[lane/n_states];
        }
        memcpy(&values[k], of, sizeof(of));
    }
    for (int r = 0; r < rows; ++r) {
        error[r] = 0.0f;
    }
    for (int first = 0; first < SPLITQ_QK; first += length) {
        const float * inside = push ? push + first*SPLITQ_QK + first : NULL;
        uint8_t (*found)[ROWS] = edges + first;
        float cost[ROWS];
        NAMED(path)(bits, from, aims + first, base + first, values, inside, costs + first, states ? states[first/length] : NULL, found, cost);
        if (close && !states) {
            int ends[2][ROWS];
            for (int r = 0; r < rows; ++r) {
                ends[0][r] = found[length - 1][r]%n_states;
                ends[1][r] = found[0][r] >> bits;
            }
            uint8_t other[32][ROWS];
            float its[ROWS];
            NAMED(path)(bits, from, aims + first, base + first, values, inside, costs + first, ends[0], found, cost);
            NAMED(path)(bits, from, aims + first, base + first, values, inside, costs + first, ends[1], other, its);
            for (int r = 0; r < rows; ++r) {
                for (int i = 0; its[r] < cost[r] && i < length; ++i) {
                    found[i][r] = other[i][r];
                }
                cost[r] = its[r] < cost[r] ? its[r] : cost[r];
            }
        }
        for (int r = 0; r < rows; ++r) {
            error[r] += cost[r];
        }
        for (int i = 0; push && first + length < SPLITQ_QK && i < length; ++i) {
            float value[16];
            for (int lane = 0; lane < 16; ++lane) {
                value[lane] = levels[found[i][lane/n_states]]*scale[lane/n_states];
            }
            NAMED(states) change;
            memcpy(&change, value, sizeof(value));
            for (int j = first + length; j < SPLITQ_QK; ++j) {
                for (int n = 0; n < COUNT; ++n) {
                    aims[j].v[n] = FMA(ALL(push[(first + i)*SPLITQ_QK + j]), change.v[n] - base[first + i].v[n], aims[j].v[n]);
                }
            }
        }
    }
}

// All scales of as many rows as fit the lanes, from row `first` on.
static void NAMED(group)(const int32_t (*from)[16], const splitq_sweep * s, int64_t first) {
    const int bits = s->bits, n_states = SPLITQ_INDICES(bits) >> bits, rows = 16/n_states, chains = bits >= 4 ? 2 : 1;
    int64_t row[ROWS];
    for (int r = 0; r < rows; ++r) {
        row[r] = first + r < s->n_rows ? first + r : s->n_rows - 1; // lanes left over do the last row again
    }
    NAMED(states) aims[32], base[32];
    for (int i = 0; i < SPLITQ_QK; ++i) {
        float of[2][16];
        for (int lane = 0; lane < 16; ++lane) {
            of[0][lane] = s->aims[i*s->n_rows + row[lane/n_states]];
            of[1][lane] = s->base[i*s->n_rows + row[lane/n_states]];
        }
        memcpy(&aims[i], of[0], sizeof(of[0]));
        memcpy(&base[i], of[1], sizeof(of[1]));
    }
    int held[2][ROWS];
    for (int r = 0; s->states && r < rows; ++r) {
        for (int c = 0; c < chains; ++c) {
            held[c][r] = s->states[c*s->n_rows + row[r]];
        }
    }
    uint8_t edges[32][ROWS];
    float error[ROWS], least[ROWS][SPLITQ_SCALES]; // the smallest errors so far
    int   number[ROWS][SPLITQ_SCALES];             // and the scales that gave them
    const bool one_run = s->states || !s->closed; // it gives the edges, too
    const int kept = one_run ? 1 : s->closed < s->n_scales ? s->closed : s->n_scales;
    uint8_t best[32][ROWS];
    for (int c = 0; c < s->n_scales; ++c) {
        float scale[ROWS];
        for (int r = 0; r < rows; ++r) {
            scale[r] = s->scales[c*s->n_rows + row[r]];
        }
        NAMED(block)(bits, from, s->levels, aims, base, scale, s->push, s->costs, s->states ? held : NULL, false, edges, error);
        for (int r = 0; r < rows; ++r) {
            int at = c < kept ? c : kept;
            for (; at > 0 && error[r] < least[r][at - 1]; --at) {
                if (at < kept) {
                    least[r][at] = least[r][at - 1];
                    number[r][at] = number[r][at - 1];
                }
            }
            if (at < kept) {
                least[r][at] = error[r];
                number[r][at] = c;
                for (int i = 0; one_run && i < SPLITQ_QK; ++i) {
                    best[i][r] = edges[i][r];
                }
            }
        }
    }
    int chosen[ROWS] = { 0 };
    float closed[ROWS] = { 0 };
    for (int c = 0; !one_run && c < kept; ++c) {
        float scale[ROWS];
        for (int r = 0; r < rows; ++r) {
            scale[r] = s->scales[number[r][c]*s->n_rows + row[r]];
        }
        NAMED(block)(bits, from, s->levels, aims, base, scale, s->push, s->costs, NULL, true, edges, error);
        for (int r = 0; r < rows; ++r) {
            if (c == 0 || error[r] < closed[r]) {
                closed[r] = error[r];
                chosen[r] = c;
                for (int i = 0; i < SPLITQ_QK; ++i) {
                    best[i][r] = edges[i][r];
                }
            }
        }
    }
    for (int r = 0; r < rows && first + r < s->n_rows; ++r) {
        s->choice[first + r] = number[r][chosen[r]];
        for (int i = 0; i < SPLITQ_QK; ++i) {
            s->edges[i*s->n_rows + first + r] = best[i][r];
        }
    }
}

static void NAMED(sweep)(const splitq_sweep * s) {
    const int n_states = SPLITQ_INDICES(s->bits) >> s->bits;
    int32_t from[WAYS][16]; // by edge into a state and lane: the lane that it comes from
    for (int k = 0; k < 1 << s->bits; ++k) {
        for (int lane = 0; lane < 16; ++lane) {
            from[k][lane] = lane/n_states*n_states + ((k*n_states + lane%n_states) >> s->bits);
        }
    }
    for (int64_t row = 0; row < s->n_rows; row += 16/n_states) {
        NAMED(group)(from, s, row);
    }
}

#undef LANES
#undef COUNT
#undef NAMED
#undef vec
#undef ivec
#undef mask
#undef ALL
#undef NUMBER
#undef INDEX
#undef HALF
#undef PERMUTE
#undef FMA
#undef MASK
#undef BETTER
#undef PICK
#undef IPICK
