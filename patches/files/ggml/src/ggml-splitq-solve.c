// SPDX-License-Identifier: MIT
#include "ggml-splitq-solve.h"
#include "ggml-splitq-encode.h"

#include <string.h>

#define LANES 16 // rows at a time: a vector of AVX-512, two of AVX2, four of NEON
#define GROUP 4  // columns whose changes are added to the later ones' aims at once
#define MOST  SPLITQ_SOLVE_COLUMNS

typedef float   vec  __attribute__((vector_size(4*LANES)));
typedef int32_t ivec __attribute__((vector_size(4*LANES)));

// a where the mask has ones, else b
#define CHOOSE(mask, a, b) ((vec) (((ivec) (a) & (mask)) | ((ivec) (b) & ~(mask))))
#define ALL(x) ((vec) {0} + (x))

// Rows from `from` on of `count` columns; `some` rows, zeros in the place of the others.
static SPLITQ_INLINE void load(vec * to, const float * from, int count, int64_t rows, int some) {
    for (int i = 0; i < count; ++i, from += rows) {
        to[i] = ALL(0.0f);
        if (some == LANES) {
            memcpy(&to[i], from, sizeof(vec));
        } else {
            memcpy(&to[i], from, sizeof(float)*some);
        }
    }
}

static SPLITQ_INLINE void store(float * to, const vec * from, int count, int64_t rows, int some) {
    for (int i = 0; i < count; ++i, to += rows) {
        if (some == LANES) {
            memcpy(to, &from[i], sizeof(vec));
        } else {
            memcpy(to, &from[i], sizeof(float)*some);
        }
    }
}

// The level nearest to each weight of which `doubled` is 2 (w - offset)/scale. By address: vectors of 64 bytes have no ABI everywhere.
static SPLITQ_INLINE void nearest(const float * table, float first, float most, const vec * doubled, vec * level) {
    vec place = *doubled - first;
    place = CHOOSE(place > ALL(0.0f), place, ALL(0.0f));
    place = CHOOSE(place < ALL(most), place, ALL(most));
    const ivec whole = __builtin_convertvector(place, ivec); // down, for nothing is negative
    const ivec at = whole - (place > __builtin_convertvector(whole, vec));
    for (int l = 0; l < LANES; ++l) {
        (*level)[l] = table[at[l]];
    }
}

// Rounds columns to their aims, which move on; what they change from `base`.
static SPLITQ_INLINE void sweep(const struct splitq_solve_columns * c, vec * aims, const vec * base, const float * push, int64_t width,
                                const vec * scale, const vec * offset, vec * units, vec * changes) {
    const float at = c->levels.first, most = c->levels.last - c->levels.first;
    vec twice[MOST];
    for (int b = 0; b < c->blocks; ++b) {
        twice[b] = CHOOSE(scale[b] == ALL(0.0f), ALL(0.0f), ALL(2.0f)/scale[b]);
    }
    for (int first = 0; first < c->count; first += GROUP) {
        for (int i = first; i < first + GROUP; ++i) {
            vec aim = aims[i];
            for (int k = first; k < i; ++k) {
                aim += push[k*width + i]*changes[k];
            }
            const int b = c->block[i];
            aim = (aim - offset[b])*twice[b];
            nearest(c->wide[i] ? c->levels.wide : c->levels.plain, at, most, &aim, &units[i]);
            changes[i] = units[i]*scale[b] + offset[b] - base[i];
        }
        const float * p = push + first*width;
        const vec d0 = changes[first], d1 = changes[first + 1], d2 = changes[first + 2], d3 = changes[first + 3];
        for (int j = first + GROUP; j < c->count; ++j) {
            aims[j] += (p[j]*d0 + p[width + j]*d1) + (p[2*width + j]*d2 + p[3*width + j]*d3);
        }
    }
}

SPLITQ_CLONES void splitq_solve_sweep(const struct splitq_solve_columns * c, int64_t rows, const float * aims, const float * base,
                                      const float * push, int64_t width, const float * scale, const float * offset, float * units, float * changes) {
    vec a[MOST], b[MOST], u[MOST], d[MOST], s[MOST], o[MOST];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(a, aims + r, c->count, rows, some);
        load(b, base + r, c->count, rows, some);
        load(s, scale + r, c->blocks, rows, some);
        load(o, offset + r, c->blocks, rows, some);
        sweep(c, a, b, push, width, s, o, u, d);
        store(units + r, u, c->count, rows, some);
        store(changes + r, d, c->count, rows, some);
    }
}

// to = m x, m [count][count] and symmetric
static SPLITQ_INLINE void times(const float * m, const vec * x, int count, vec * to) {
    for (int j = 0; j < count; j += GROUP) {
        vec sum[GROUP] = { 0 };
        for (int i = 0; i < count; ++i) {
            const float * row = m + i*count + j;
            sum[0] += row[0]*x[i];
            sum[1] += row[1]*x[i];
            sum[2] += row[2]*x[i];
            sum[3] += row[3]*x[i];
        }
        memcpy(&to[j], sum, sizeof(sum));
    }
}

SPLITQ_CLONES void splitq_solve_search(const struct splitq_solve_columns * c, int64_t rows, const float * aims, const float * values,
                                       const float * pull, const float * push, const float * h, int32_t copies,
                                       const float * scale, const float * offset, float * units, float * changes, int32_t * best) {
    const int m = c->count;
    const int64_t one = c->blocks*rows; // copy
    float back[MOST*MOST]; // by how much a change of column i moves what is best for j, given all others
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < m; ++j) {
            back[i*m + j] = -h[i*m + j]/h[j*m + j];
        }
    }
    vec aim[MOST], old[MOST], here[MOST], u[MOST], d[MOST], s[MOST], o[MOST], found[MOST], moved[MOST], best_u[MOST], best_d[MOST];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(aim,    aims   + r, m, rows, some);
        load(old,    values + r, m, rows, some);
        load(here,   pull   + r, m, rows, some);
        load(best_u, units  + r, m, rows, some);
        memset(best_d, 0, sizeof(vec)*m);
        vec  most  = ALL(0.0f);
        ivec which = (ivec) {0} - 1;
        for (int copy = 0; copy < copies; ++copy) {
            load(s, scale  + copy*one + r, c->blocks, rows, some);
            load(o, offset + copy*one + r, c->blocks, rows, some);
            memcpy(moved, aim, sizeof(vec)*m);
            sweep(c, moved, aim, push, m, s, o, u, d);
            times(h, d, m, moved);
            for (int i = 0; i < m; ++i) {
                found[i] = aim[i] + d[i];
                moved[i] = found[i] - moved[i]/h[i*m + i];
            }
            sweep(c, moved, found, back, m, s, o, u, d);
            for (int i = 0; i < m; ++i) {
                d[i] += found[i] - old[i];
            }
            times(h, d, m, moved);
            vec gain = ALL(0.0f);
            for (int i = 0; i < m; ++i) {
                gain += d[i]*(here[i] + here[i] - moved[i]);
            }
            const ivec better = gain > most;
            most  = CHOOSE(better, gain, most);
            which = (better & copy) | (~better & which);
            for (int i = 0; i < m; ++i) {
                best_u[i] = CHOOSE(better, u[i], best_u[i]);
                best_d[i] = CHOOSE(better, d[i], best_d[i]);
            }
        }
        store(units   + r, best_u, m, rows, some);
        store(changes + r, best_d, m, rows, some);
        memcpy(best + r, &which, sizeof(int32_t)*some);
    }
}
