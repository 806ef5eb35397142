// SPDX-License-Identifier: MIT
#include "ggml-splitq-solve.h"
#include "ggml-splitq-encode.h"
#include "ggml-windows-solve.h"

#include <math.h>
#include <string.h>

#define LANES    16 // rows at a time: a vector of AVX-512, two of AVX2, four of NEON
#define GROUP    4  // columns whose changes are added to the later ones' aims at once
#define MOST     SPLITQ_SOLVE_COLUMNS
#define REFITTED SPLITQ_REFIT_COLUMNS

typedef float   vec  __attribute__((vector_size(4*LANES)));
typedef int32_t ivec __attribute__((vector_size(4*LANES)));

// a where the mask has ones, else b
#define CHOOSE(mask, a, b) ((vec) (((ivec) (a) & (mask)) | ((ivec) (b) & ~(mask))))
#define ALL(x) ((vec) {0} + (x))

// Which blocks the columns of a call lie in, without repetition, and which of these each column does.
struct blocks {
    int     count;
    int64_t which[MOST];
    uint8_t of[MOST];
};

static void find_blocks(const struct splitq_solve_columns * c, struct blocks * blocks) {
    blocks->count = 0;
    for (int i = 0; i < c->count; ++i) {
        int b = 0;
        while (b < blocks->count && blocks->which[b] != c->block[i]) {
            ++b;
        }
        blocks->which[b] = c->block[i];
        blocks->of[i] = b;
        blocks->count += b == blocks->count;
    }
}

// Columns of `rows` values from `from` on, `which` of them or, where that is NULL, the first ones; `some` rows, zeros in the place
// of the others.
static SPLITQ_INLINE void load(vec * to, const float * from, const int64_t * which, int count, int64_t rows, int some) {
    for (int i = 0; i < count; ++i) {
        const float * column = from + (which ? which[i] : i)*rows;
        to[i] = ALL(0.0f);
        if (some == LANES) {
            memcpy(&to[i], column, sizeof(vec));
        } else {
            memcpy(&to[i], column, sizeof(float)*some);
        }
    }
}

static SPLITQ_INLINE void store(float * to, const vec * from, const int64_t * which, int count, int64_t rows, int some) {
    for (int i = 0; i < count; ++i) {
        float * column = to + (which ? which[i] : i)*rows;
        if (some == LANES) {
            memcpy(column, &from[i], sizeof(vec));
        } else {
            memcpy(column, &from[i], sizeof(float)*some);
        }
    }
}

// What changes of GROUP columns move the aims of later ones by; p: the pushes of the first, `width` before the next one's.
static SPLITQ_INLINE void push_on(vec * aims, const float * p, int64_t width, const vec * changes, int from, int to) {
    const vec d0 = changes[0], d1 = changes[1], d2 = changes[2], d3 = changes[3];
    for (int j = from; j < to; ++j) {
        aims[j] += (p[j]*d0 + p[width + j]*d1) + (p[2*width + j]*d2 + p[3*width + j]*d3);
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
static SPLITQ_INLINE void sweep(const struct splitq_solve_columns * c, const struct blocks * blocks, vec * aims, const vec * base,
                                const float * push, int64_t width, const vec * scale, const vec * offset, vec * units, vec * changes) {
    const float at = c->levels.first, most = c->levels.last - c->levels.first;
    vec twice[MOST];
    for (int b = 0; b < blocks->count; ++b) {
        twice[b] = CHOOSE(scale[b] == ALL(0.0f), ALL(0.0f), ALL(2.0f)/scale[b]);
    }
    for (int first = 0; first < c->count; first += GROUP) {
        for (int i = first; i < first + GROUP; ++i) {
            vec aim = aims[i];
            for (int k = first; k < i; ++k) {
                aim += push[k*width + i]*changes[k];
            }
            const int b = blocks->of[i];
            aim = (aim - offset[b])*twice[b];
            nearest(c->numbers[i] < c->wide ? c->levels.wide : c->levels.plain, at, most, &aim, &units[i]);
            changes[i] = units[i]*scale[b] + offset[b] - base[i];
        }
        push_on(aims, push + first*width, width, changes + first, first + GROUP, c->count);
    }
}

SPLITQ_CLONES void splitq_solve_sweep(const struct splitq_solve_columns * c, int64_t rows, const float * aims, const float * base,
                                      const float * push, int64_t width, const float * scale, const float * offset, float * units, float * changes) {
    struct blocks blocks;
    find_blocks(c, &blocks);
    vec a[MOST], b[MOST], u[MOST], d[MOST], s[MOST], o[MOST];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(a, aims   + r, NULL, c->count, rows, some);
        load(b, base   + r, NULL, c->count, rows, some);
        load(s, scale  + r, blocks.which, blocks.count, rows, some);
        load(o, offset + r, blocks.which, blocks.count, rows, some);
        sweep(c, &blocks, a, b, push, width, s, o, u, d);
        store(units   + r, u, NULL, c->count, rows, some);
        store(changes + r, d, NULL, c->count, rows, some);
    }
}

// to = m x, m [count][count] in rows of `width`, and symmetric
static SPLITQ_INLINE void times(const float * m, int64_t width, const vec * x, int count, vec * to) {
    for (int j = 0; j < count; j += GROUP) {
        vec sum[GROUP] = { 0 };
        for (int i = 0; i < count; ++i) {
            const float * row = m + i*width + j;
            sum[0] += row[0]*x[i];
            sum[1] += row[1]*x[i];
            sum[2] += row[2]*x[i];
            sum[3] += row[3]*x[i];
        }
        memcpy(&to[j], sum, sizeof(sum));
    }
}

SPLITQ_CLONES void splitq_solve_search(const struct splitq_solve_columns * c, int64_t rows, const float * values, const float * pull,
                                       const float * inverse, const float * push, const float * h, int32_t copies, int64_t all,
                                       const float * scale, const float * offset, float * units, float * changes, int64_t * taken) {
    const int m = c->count;
    struct blocks blocks;
    find_blocks(c, &blocks);
    float back[MOST*MOST]; // by how much a change of column i moves what is best for j, given all others
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < m; ++j) {
            back[i*m + j] = -h[i*m + j]/h[j*m + j];
        }
    }
    vec aim[MOST], old[MOST], here[MOST], u[MOST], d[MOST], s[MOST], o[MOST], found[MOST], moved[MOST], best_u[MOST], best_d[MOST];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(old,    values + r, c->numbers, m, rows, some);
        load(here,   pull   + r, c->numbers, m, rows, some);
        load(best_u, units  + r, c->numbers, m, rows, some);
        times(inverse, m, here, m, aim);
        for (int i = 0; i < m; ++i) {
            aim[i] += old[i];
        }
        memset(best_d, 0, sizeof(vec)*m);
        vec  most  = ALL(0.0f);
        ivec which = (ivec) {0};
        for (int copy = 0; copy < copies; ++copy) {
            load(s, scale  + copy*all*rows + r, blocks.which, blocks.count, rows, some);
            load(o, offset + copy*all*rows + r, blocks.which, blocks.count, rows, some);
            memcpy(moved, aim, sizeof(vec)*m);
            sweep(c, &blocks, moved, aim, push, m, s, o, u, d);
            times(h, m, d, m, moved);
            for (int i = 0; i < m; ++i) {
                found[i] = aim[i] + d[i];
                moved[i] = found[i] - moved[i]/h[i*m + i];
            }
            sweep(c, &blocks, moved, found, back, m, s, o, u, d);
            for (int i = 0; i < m; ++i) {
                d[i] += found[i] - old[i];
            }
            times(h, m, d, m, moved);
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
        store(units   + r, best_u, c->numbers, m, rows, some);
        store(changes + r, best_d, NULL, m, rows, some);
        for (int b = 0; b < blocks.count; ++b) {
            for (int l = 0; l < some; ++l) {
                taken[blocks.which[b]*rows + r + l] = which[l];
            }
        }
    }
}

SPLITQ_CLONES void splitq_windows_search(const splitq_windows_kind * kind, int32_t n_blocks, const int64_t * blocks, const int64_t * columns,
                                         int64_t rows, const float * values, const float * pull, const float * inverse, const float * push,
                                         const float * h, const float * costs, uint8_t * params, uint8_t * edges, float * changes) {
    const int m = 32*n_blocks, length = kind->bits >= 4 ? 16 : 32; // of a chain
    vec aim[MOST], old[MOST], here[MOST], d[MOST], moved[MOST];
    uint8_t held[MOST/16*LANES], bytes[MOST/32*LANES], found[MOST*LANES];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(old,  values + r, columns, m, rows, some);
        load(here, pull   + r, columns, m, rows, some);
        times(inverse, m, here, m, aim);
        for (int i = 0; i < m; ++i) {
            aim[i] += old[i];
        }
        memset(held,  0, sizeof(held));
        memset(bytes, 0, sizeof(bytes));
        for (int l = 0; l < some; ++l) {
            for (int c = 0; c < m/length; ++c) {
                held[c*LANES + l] = edges[columns[c*length]*rows + r + l] >> kind->bits;
            }
            for (int b = 0; b < n_blocks; ++b) {
                bytes[b*LANES + l] = params[blocks[b]*rows + r + l];
            }
        }
        splitq_windows_code(kind, n_blocks, LANES, (float *) aim, (float *) aim, push, m, costs, kind->closed ? held : NULL, bytes, found,
                            (float *) d);
        vec gain = ALL(0.0f);
        for (int i = 0; i < m; ++i) {
            d[i] += aim[i] - old[i];
        }
        times(h, m, d, m, moved);
        for (int i = 0; i < m; ++i) {
            gain += d[i]*(here[i] + here[i] - moved[i]);
        }
        const ivec better = gain > ALL(0.0f);
        for (int i = 0; i < m; ++i) {
            d[i] = CHOOSE(better, d[i], ALL(0.0f));
        }
        store(changes + r, d, NULL, m, rows, some);
        for (int l = 0; l < some; ++l) {
            for (int i = 0; better[l] && i < m; ++i) {
                edges[columns[i]*rows + r + l] = found[i*LANES + l];
            }
            for (int b = 0; better[l] && b < n_blocks; ++b) {
                params[blocks[b]*rows + r + l] = bytes[b*LANES + l];
            }
        }
    }
}

static SPLITQ_INLINE void cut(vec * x, float least, float most) {
    *x = CHOOSE(*x > ALL(least), *x, ALL(least));
    *x = CHOOSE(*x < ALL(most), *x, ALL(most));
}

// The nearest values that can be stored, which are those of `step` from `least` to `most` if there are steps.
static SPLITQ_INLINE void to_grid(const struct splitq_solve_grid * g, const vec * step, float least, float most, vec * value) {
    if (g->kind == SPLITQ_SOLVE_HALF) {
        cut(value, -65504.0f, 65504.0f);
        vec power = (vec) ((ivec) *value & 0x7f800000); // of 2, at most the magnitude
        power = CHOOSE(power > ALL(0x1p-14f), power, ALL(0x1p-14f));
        const vec large = power*0x1.8p13f; // a float of this size ends where a half of the value's ends: ties to even
        *value = (*value + large) - large;
    } else if (g->kind == SPLITQ_SOLVE_STEPS) {
        vec times = CHOOSE(*step == ALL(0.0f), ALL(0.0f), *value / *step);
        cut(&times, least, most);
        *value = *step*((times + 0x1.8p23f) - 0x1.8p23f); // to whole ones, ties to even
    } else {
        const float * table = g->table;
        for (int l = 0; l < LANES; ++l) {
            const float size = fabsf((*value)[l]);
            int at = 0;
            for (int half = SPLITQ_SOLVE_VALUES/2; half > 0; half /= 2) {
                at += (table[at + half - 1] + table[at + half])/2 < size ? half : 0;
            }
            (*value)[l] = (*value)[l] < 0.0f ? -table[at] : table[at];
        }
    }
}

SPLITQ_CLONES void splitq_solve_refit(const struct splitq_solve_grid * g, int32_t count, int32_t size, int64_t rows, const float * units,
                                      const float * second, const float * pull, const float * h, int64_t width, float * scale,
                                      float * offset, float * changes) {
    vec u[REFITTED], v[REFITTED], hu[REFITTED], hv[REFITTED], left[REFITTED], moved[REFITTED]; // hu, hv: a block's part of h times u, v
    for (int i = 0; i < count; ++i) {
        float sum = 0.0f;
        for (int j = i/size*size; j < i/size*size + size; ++j) {
            sum += h[i*width + j];
        }
        v[i]  = ALL(1.0f);
        hv[i] = ALL(sum);
    }
    for (int64_t r = 0; r < rows; r += LANES) {
        const int some = rows - r < LANES ? (int) (rows - r) : LANES;
        load(u,    units + r, NULL, count, rows, some);
        load(left, pull  + r, NULL, count, rows, some);
        if (second) {
            load(v, second + r, NULL, count, rows, some);
        }
        for (int first = 0, b = 0; first < count; first += size, ++b) {
            const int behind = first + size;
            times(h + first*width + first, width, u + first, size, hu + first);
            if (second) {
                times(h + first*width + first, width, v + first, size, hv + first);
            }
            vec aa = ALL(0.0f), ab = ALL(0.0f), bb = ALL(0.0f), pa = ALL(0.0f), pb = ALL(0.0f);
            for (int i = first; i < behind; ++i) {
                aa += hu[i]*u[i];
                ab += hu[i]*v[i];
                bb += hv[i]*v[i];
                pa += left[i]*u[i];
                pb += left[i]*v[i];
            }
            vec x = CHOOSE(aa > ALL(0.0f), pa/aa, ALL(0.0f)), y, was, below = ALL(0.0f), step;
            load(&was, scale + b*rows + r, NULL, 1, rows, some);
            vec middle = below;
            if (offset) {
                const vec determinant = aa*bb - ab*ab;
                const ivec solvable = determinant > ALL(1e-4f)*aa*bb;
                x = CHOOSE(solvable, (pa*bb - pb*ab)/determinant, x);
                y = CHOOSE(solvable, (pb*aa - pa*ab)/determinant, ALL(0.0f));
                load(&below, offset + b*rows + r, NULL, 1, rows, some);
                load(&step, (g->kind == SPLITQ_SOLVE_STEPS ? g->steps_below : offset) + b*rows + r, NULL, 1, rows, some);
                middle = below + y;
                to_grid(g, &step, -g->most, 0.0f, &middle);
            }
            load(&step, (g->kind == SPLITQ_SOLVE_STEPS ? g->steps : scale) + b*rows + r, NULL, 1, rows, some);
            vec scaled = was + x;
            to_grid(g, &step, g->least, g->most, &scaled);
            vec gain = ALL(0.0f);
            for (int i = first; i < behind; ++i) {
                moved[i] = u[i]*(scaled - was) + v[i]*(middle - below);
                gain += moved[i]*(left[i] + left[i] - (hu[i]*(scaled - was) + hv[i]*(middle - below)));
            }
            const ivec better = gain > ALL(0.0f);
            for (int i = first; i < behind; ++i) {
                moved[i] = CHOOSE(better, moved[i], ALL(0.0f));
            }
            scaled = CHOOSE(better, scaled, was);
            middle = CHOOSE(better, middle, below);
            store(scale + b*rows + r, &scaled, NULL, 1, rows, some);
            if (offset) {
                store(offset + b*rows + r, &middle, NULL, 1, rows, some);
            }
            for (int i = first; i < behind; i += GROUP) {
                vec back[GROUP] = { -moved[i], -moved[i + 1], -moved[i + 2], -moved[i + 3] };
                push_on(left, h + i*width, width, back, behind, count);
            }
        }
        store(changes + r, moved, NULL, count, rows, some);
    }
}
