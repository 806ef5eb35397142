// SPDX-License-Identifier: MIT
// What THREADS threads multiply with operands in registers, in billions of multiply-adds a second, a line for each instruction
// that the kernels use on this processor: NAME RATE. The best of several passes.
//   multiply THREADS
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"

#define SUMS 12 // independent ones, more than an instruction takes cycles

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static int8_t numbers[2][64]; // not zeros, with which processors run faster

// A loop of an instruction: STEP changes one sum, operands a and b. `hide` keeps the compiler from multiplying once for all.
#define KERNEL(function, vector, step)                                                              \
    static void function(int64_t turns, void * out) {                                               \
        vector sum[SUMS], a, b;                                                                     \
        memset(sum, 0, sizeof(sum)), memcpy(&a, numbers[0], sizeof(a)), memcpy(&b, numbers[1], sizeof(b)); \
        for (int64_t i = 0; i < turns; ++i) {                                                       \
            _Pragma("GCC unroll 12")                                                                \
            for (int j = 0; j < SUMS; ++j) { hide(b); sum[j] = step(sum[j], a, b); }                \
        }                                                                                           \
        for (int j = 1; j < SUMS; ++j) { sum[0] = add(sum[0], sum[j]); }                            \
        memcpy(out, sum, sizeof(*sum));                                                             \
    }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define hide(b) __asm__ volatile("" : "+v"(b))
#define add _mm512_add_epi32
#define NAME "vpdpbusd, 512 bits"
#define EACH 64
KERNEL(plain, __m512i, _mm512_dpbusd_epi32)
#elif defined(__AVXVNNI__)
#define hide(b) __asm__ volatile("" : "+x"(b))
#define add _mm256_add_epi32
#define NAME "vpdpbusd, 256 bits"
#define EACH 32
KERNEL(plain, __m256i, _mm256_dpbusd_avx_epi32)
#elif defined(__AVX2__)
#define hide(b) __asm__ volatile("" : "+x"(b))
#define add _mm256_add_epi32
#define NAME "vpmaddubsw"
#define EACH 32
static inline __m256i step(__m256i sum, __m256i a, __m256i b) {
    return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
KERNEL(plain, __m256i, step)
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define hide(b) __asm__ volatile("" : "+w"(b))
#define add vaddq_s32
#define NAME "smmla"
#define EACH 32
static inline int32x4_t step(int32x4_t sum, int32x4_t a, int32x4_t b) {
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
KERNEL(plain, int32x4_t, step)
#elif defined(__ARM_FEATURE_DOTPROD)
#define hide(b) __asm__ volatile("" : "+w"(b))
#define add vaddq_s32
#define NAME "sdot"
#define EACH 16
static inline int32x4_t step(int32x4_t sum, int32x4_t a, int32x4_t b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
KERNEL(plain, int32x4_t, step)
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define TILES
struct config { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

static void tiles(int64_t turns, int bf16) {
    static int8_t operands[1024];
    struct config own = { .palette = 1 };
    for (int i = 0; i < 8; ++i) { own.bytes[i] = 64, own.rows[i] = 16; }
    for (int i = 0; i < 1024; ++i) { operands[i] = (int8_t) (bf16 ? i % 2 ? 0x3f : i : i*37); } // bfloat16: around 1
    __asm__ volatile("ldtilecfg %0" : : "m"(own));
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    __asm__ volatile("" : : : "memory");
    _tile_loadd(4, operands, 64); _tile_loadd(5, operands, 64); _tile_loadd(6, operands, 64); _tile_loadd(7, operands, 64);
    for (int64_t i = 0; i < turns; ++i) {
        if (bf16) {
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_release();
}

static void tiles_bf16(int64_t turns, void * out) { (void) out, tiles(turns, 1); }
static void tiles_int8(int64_t turns, void * out) { (void) out, tiles(turns, 0); }
#endif

struct kernel {
    const char * name;
    void (*run)(int64_t turns, void * out);
    double each; // multiply-adds of a turn
};

static const struct kernel kernels[] = {
#if defined(NAME)
    { NAME, plain, SUMS*EACH },
#endif
#if defined(TILES)
    { "tdpbf16ps", tiles_bf16, 4*16*16*32 },
    { "tdpbssd",   tiles_int8, 4*16*16*64 },
#endif
    { NULL, NULL, 0 },
};

struct worker {
    const struct kernel * kernel;
    int64_t turns;
    char    out[64];
};

static void work(void * own) {
    struct worker * w = own;
    w->kernel->run(w->turns, w->out);
}

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    static struct worker workers[MOST];
    static void * own[MOST];
    if (threads < 1 || threads > MOST) {
        return 2;
    }
    for (size_t i = 0; i < sizeof(numbers); ++i) { ((int8_t *) numbers)[i] = (int8_t) (i*37 % 101); }
    for (const struct kernel * k = kernels; k->name; ++k) {
#if defined(TILES)
        if (k->run != plain && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */)) {
            continue; // the kernels go without them, too
        }
#endif
        for (int i = 0; i < threads; ++i) { // 2e9 multiply-adds of each thread
            workers[i].kernel = k, workers[i].turns = (int64_t) (2e9/k->each), own[i] = &workers[i];
        }
        printf("%s\t%f\n", k->name, workers[0].turns*k->each*threads/fastest(threads, work, own)/1e9);
    }
    return 0;
}
