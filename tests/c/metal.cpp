// SPDX-License-Identifier: MIT
// Runs the Metal kernels on the CPU: a thread for each of a threadgroup's, and just enough of Metal's library.
// tests/test_metal.py compiles this with splitq.h and upstream's mul_mm.metal, of which it keeps no instantiation but ours.
//
//   metal decode TYPE HALF       stdin: blocks; stdout: their weights, float32 or float16
//   metal mul_mv TYPE COLUMNS ROWS MATRICES TOKENS REPEATS    stdin: float32 activations of each of MATRICES*REPEATS batches,
//   metal mul_mm TYPE ...                                     blocks of each matrix; stdout: float32 results
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "ggml-metal-impl.h"
#include "ggml-metal-splitq.h"

using namespace std;

#define device
#define constant
#define threadgroup
#define kernel
#define FOR_UNROLL(x) for (x)
#define N_SIMDWIDTH 32

typedef unsigned int   uint;
typedef unsigned short ushort;
typedef _Float16       half;
struct uint3 { uint x, y, z; };

enum class mem_flags { mem_none, mem_threadgroup };
static unique_ptr<barrier<>> all_threads;
static thread_local ushort   lane, simdgroup;
static float                 shared_sums[8][N_SIMDWIDTH];

static void threadgroup_barrier(mem_flags) { all_threads->arrive_and_wait(); }
static void simdgroup_barrier(mem_flags) {}

// the order of Metal's own additions is not documented
static float simd_sum(float x) {
    shared_sums[simdgroup][lane] = x;
    all_threads->arrive_and_wait();
    float sum = 0;
    for (float s : shared_sums[simdgroup]) { sum += s; }
    all_threads->arrive_and_wait();
    return sum;
}
static float simd_max(float x) { return x; }  // only in kernels that are not run

template<typename T, int columns, int rows> struct matrix {
    T v[columns][rows];
    T * operator[](int column) { return v[column]; }
    template<typename U> explicit operator matrix<U, columns, rows>() {
        matrix<U, columns, rows> m;
        for (int i = 0; i < columns*rows; ++i) { m[i/rows][i%rows] = U(v[i/rows][i%rows]); }
        return m;
    }
    matrix operator*(T factor) const {
        matrix m = *this;
        for (auto & column : m.v) { for (T & x : column) { x *= factor; } }
        return m;
    }
};
typedef matrix<float, 1, 4> float4;
typedef matrix<float, 4, 4> float4x4;
typedef matrix<half,  4, 4> half4x4;
typedef matrix<float, 2, 4> float2x4;
typedef matrix<half,  2, 4> half2x4;

// Spread over a simdgroup in Metal; here every thread has all of it, and all write the same.
struct simdgroup_float8x8 { float v[8][8]; };
typedef simdgroup_float8x8 simdgroup_half8x8;

template<typename T, int n> simdgroup_float8x8 make_filled_simdgroup_matrix(T) { return {}; }
template<typename T> void simdgroup_load(simdgroup_float8x8 & m, const T * from, int stride, int, bool) {
    for (int i = 0; i < 64; ++i) { m.v[i/8][i%8] = from[i/8*stride + i%8]; }
}
static void simdgroup_store(const simdgroup_float8x8 & m, float * to, int stride, int, bool) {
    for (int i = 0; i < 64; ++i) { to[i/8*stride + i%8] = m.v[i/8][i%8]; }
}
static void simdgroup_multiply_accumulate(simdgroup_float8x8 & d, const simdgroup_float8x8 & a, const simdgroup_float8x8 & b,
                                          const simdgroup_float8x8 & c) {
    for (int i = 0; i < 64; ++i) {
        float sum = c.v[i/8][i%8];
        for (int k = 0; k < 8; ++k) { sum += a.v[i/8][k]*b.v[k][i%8]; }
        d.v[i/8][i%8] = sum;
    }
}

#define thread  // a qualifier in Metal
#include "splitq.h"

// upstream names the type of its kernels by this one
template<typename type4x4> void dequantize_f32(const float4x4 *, short, type4x4 &) {}
#include "mul_mm.metal"
#undef thread

static vector<char> read_all() {
    vector<char> data;
    for (int c; (c = getchar()) != EOF;) { data.push_back((char) c); }
    return data;
}

template<short bits, bool windows, typename T> static void decode() {
    const vector<char> data = read_all();
    auto * blocks = (const splitq_block<bits, windows> *) data.data();
    for (size_t i = 0; i < 2*(data.size()/sizeof(*blocks)); ++i) {
        matrix<T, 4, 4> weights;
        splitq_dequantize(blocks + i/2, i%2, weights);
        fwrite(&weights, sizeof(weights), 1, stdout);
    }
}

template<typename F> static void dispatch(uint x, uint y, uint z, ushort simdgroups, F && run) {
    all_threads = make_unique<barrier<>>(simdgroups*N_SIMDWIDTH);
    for (uint i = 0; i < x*y*z; ++i) {
        vector<std::thread> threads;
        for (ushort t = 0; t < simdgroups*N_SIMDWIDTH; ++t) {
            threads.emplace_back([&, i, t] {
                lane = t%N_SIMDWIDTH;
                simdgroup = t/N_SIMDWIDTH;
                run(uint3 { i%x, i/x%y, i/x/y }, t);
            });
        }
        for (auto & t : threads) { t.join(); }
    }
}

template<short bits, bool windows> static void multiply(bool mm, char ** argv) {
    const int columns = atoi(argv[0]), rows = atoi(argv[1]), matrices = atoi(argv[2]), tokens = atoi(argv[3]), repeats = atoi(argv[4]);
    const int batches = matrices*repeats;
    const uint64_t row = columns/32*sizeof(splitq_block<bits, windows>), token = sizeof(float)*columns;
    const vector<char> data = read_all();
    const char * y = data.data(), * x = y + token*tokens*batches;
    vector<float> dst(batches*tokens*rows);
    alignas(16) static char shmem[8192];

    if (mm) {
        FC_mul_mm_bc_out = true;
        FC_mul_mm_ne12 = batches;
        FC_mul_mm_r2 = repeats;
        FC_mul_mm_r3 = 1;
        const ggml_metal_kargs_mul_mm args = {
            .ne00 = columns, .ne02 = matrices, .nb01 = row, .nb02 = row*rows, .nb03 = row*rows*matrices, .ne12 = batches,
            .nb10 = sizeof(float), .nb11 = token, .nb12 = token*tokens, .nb13 = token*tokens*batches, .ne0 = rows, .ne1 = tokens,
            .r2 = (int16_t) repeats, .r3 = 1,
        };
        dispatch((tokens + 31)/32, (rows + 63)/64, batches, 4, [&](uint3 group, ushort t) {
            kernel_mul_mm<half, half4x4, simdgroup_half8x8, half, half2x4, simdgroup_half8x8, splitq_block<bits, windows>, 2,
                          splitq_dequantize, float, float4x4, float, float2x4>(
                const_cast<ggml_metal_kargs_mul_mm &>(args), x, y, (char *) dst.data(), shmem, group, t, simdgroup);
        });
    } else {
        ggml_metal_kargs_mul_mv args = {
            .ne00 = columns, .ne01 = rows, .ne02 = matrices, .nb00 = sizeof(splitq_block<bits, windows>), .nb01 = row, .nb02 = row*rows,
            .nb03 = row*rows*matrices, .ne10 = columns, .ne11 = tokens, .ne12 = batches, .nb10 = sizeof(float), .nb11 = token,
            .nb12 = token*tokens, .nb13 = token*tokens*batches, .ne0 = rows, .ne1 = tokens, .nr0 = N_R0_SPLITQ,
            .r2 = (int16_t) repeats, .r3 = 1,
        };
        const uint group_rows = N_SG_SPLITQ*N_R0_SPLITQ;
        dispatch((rows + group_rows - 1)/group_rows, tokens, batches, N_SG_SPLITQ, [&](uint3 group, ushort) {
            splitq_mul_mv<bits, windows>(args, x, y, (char *) dst.data(), shmem, group, lane, simdgroup);
        });
    }
    fwrite(dst.data(), sizeof(float), dst.size(), stdout);
}

template<short bits, bool windows> static void run(char ** argv) {
    if (strcmp(argv[1], "decode")) {
        multiply<bits, windows>(!strcmp(argv[1], "mul_mm"), argv + 3);
    } else {
        atoi(argv[3]) ? decode<bits, windows, half>() : decode<bits, windows, float>();
    }
}

int main(int, char ** argv) {
#define SPLITQ_RUN(name, bits, windows) if (!strcmp(argv[2], #name)) { run<bits, windows>(argv); }
    SPLITQ_EACH(SPLITQ_RUN)
}
