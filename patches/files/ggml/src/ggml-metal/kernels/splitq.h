// SPDX-License-Identifier: MIT
// sq4, sq3, sq2 and sq6w to sq2w for Metal: decoding, and matrix times vector. Stands behind dequantize.h when
// GGML_METAL_SPLITQ is on, see splitq.cmake; products with many columns and get_rows are upstream's templates around
// splitq_dequantize. tests/test_metal.py of gguf-splitq runs this file on the CPU; no device has run it.

#include "ggml-metal-splitq.h"

// 32 weights of 4, 3 or 2 bits, of sq4, sq3 or sq2, or as windows of 6 to 2 bits, of sq6w to sq2w; bytes are read one by one,
// for a block has no alignment.
template<short bits, bool windows>
struct splitq_block {
    uint8_t qs[4*bits];  // 3, 5, 6 bits: the low two or four bits of all codes, then their high bits
    uint8_t d;
};

// The levels of a type with so many bits: splitq_levels[4 - bits], splitq_windows[6 - bits]
#define SPLITQ_LEVELS(name, down, up, lower, middle, upper) { lower, middle, upper },
constexpr constant static float splitq_levels[3][16] = {
#include "ggml-splitq-levels.h"
};
#undef SPLITQ_LEVELS

#define SPLITQ_WINDOWS(name, bits, rms, ...) { __VA_ARGS__ },
constexpr constant static float splitq_windows[5][64] = {
#include "ggml-windows-tables.h"
};
#undef SPLITQ_WINDOWS

template<short bits, bool windows>
static inline float splitq_level(short i) {
    if (windows) {
        return i < 64 ? splitq_windows[6 - bits][i] : -1 - splitq_windows[6 - bits][(i - 64) ^ 1];
    }
    return splitq_levels[windows ? 0 : 4 - bits][i%16];
}

// 15 bits hold the value of every scale byte, in units of 2^-21; no step needs a float below the normal ones.
static inline float splitq_scale(uint8_t d) {
    const short shift = (d >> 3) & 15;
    const float scale = ((d & 7) | (shift > 0) << 3) << (shift - (shift > 0));
    return scale*(d & 128 ? -1.f/(1 << 21) : 1.f/(1 << 21));
}

// The 6 or 7 bits of weight i's window, see ggml-windows.h: some of a byte and, of its chain, some of the next.
template<short bits>
static inline short splitq_window(device const splitq_block<bits, true> * b, short i) {
    const short first = bits >= 4 ? i/16*8 : 0, shift = bits >= 4 ? i/8%2*4 : i/8*2;
    const short q = (b->qs[first + i%8] >> shift) | (b->qs[first + (i + 1)%8] << (8 - shift));
    if (bits == 4 || bits == 2) {
        return q & 63;
    }
    const short p = 4*(i%8) + i/8, next = (p + 1)%32;
    if (bits > 4) {
        const short high = bits == 5 ? (b->qs[16 + p/8] >> p%8) & 1 : (b->qs[16 + i%8] >> i/8*2) & 3;
        return (q & (bits == 5 ? 47 : 15)) | high << 4 | (q & 16) << 2;
    }
    return (q & 15) | ((b->qs[4*bits - 4 + p/8] >> p%8) & 1) << 4 | ((b->qs[4*bits - 4 + next/8] >> next%8) & 1) << 5;
}

// code of weight i, 0 .. 31
template<short bits, bool windows>
static inline short splitq_code(device const splitq_block<bits, windows> * b, short i) {
    if (windows) {
        return splitq_window<bits>((device const splitq_block<bits, true> *) b, i);
    }
    if (bits == 4) {
        return (b->qs[i%16] >> 4*(i/16)) & 15;
    }
    const short low = (b->qs[i%8] >> 2*(i/8)) & 3;
    return bits == 2 ? low : low | ((b->qs[4*bits - 4 + i/8] >> i%8) & 1) << 2;
}

// Weights 16*il .. 16*il + 15. A product of scale and level has 11 bits, so halves are exact down to 2^-14.
template<short bits, bool windows, typename type4x4>
void splitq_dequantize(device const splitq_block<bits, windows> * b, short il, thread type4x4 & reg) {
    const float d = splitq_scale(b->d);
    FOR_UNROLL (short i = 0; i < 16; ++i) {
        reg[i/4][i%4] = d*splitq_level<bits, windows>(splitq_code(b, 16*il + i));
    }
}

// Each of N_SG_SPLITQ simdgroups multiplies N_R0_SPLITQ rows with one column; a thread takes half a block of every 16.
template<short bits, bool windows, typename args_t>
void splitq_mul_mv_impl(
        args_t args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        threadgroup  char * shmem,
        uint3  tgpig,
        ushort tiisg,
        ushort sgitg) {
    // looked up here rather than in constant memory, as for IQ4_NL
    threadgroup float * levels = (threadgroup float *) shmem;
    for (short i = tiisg; i < (windows ? bits > 4 ? 128 : 64 : 16); i += N_SIMDWIDTH) {
        levels[i] = splitq_level<bits, windows>(i);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int  r0  = (tgpig.x*N_SG_SPLITQ + sgitg)*N_R0_SPLITQ;
    const uint i12 = tgpig.z%args.ne12;
    const uint i13 = tgpig.z/args.ne12;

    device const char  * x = src0 + (i12/args.r2)*args.nb02 + (i13/args.r3)*args.nb03;
    device const float * y = (device const float *) (src1 + tgpig.y*args.nb11 + i12*args.nb12 + i13*args.nb13);

    float sums[N_R0_SPLITQ] = { 0.f };

    for (int ib = tiisg/2; ib < args.ne00/32; ib += N_SIMDWIDTH/2) {
        const short i0 = 16*(tiisg%2);

        float yl[16];
        FOR_UNROLL (short i = 0; i < 16; ++i) {
            yl[i] = y[32*ib + i0 + i];
        }

        FOR_UNROLL (short row = 0; row < N_R0_SPLITQ; ++row) {
            // past the last row the last one is read again, and dropped
            device const splitq_block<bits, windows> * b = (device const splitq_block<bits, windows> *) (x + min(r0 + row, args.ne01 - 1)*args.nb01) + ib;

            float sum = 0.f;
            FOR_UNROLL (short i = 0; i < 16; ++i) {
                sum += yl[i]*levels[splitq_code(b, i0 + i)];
            }
            sums[row] += splitq_scale(b->d)*sum;
        }
    }

    device float * out = (device float *) dst + ((uint64_t) tgpig.z*args.ne1 + tgpig.y)*args.ne0;

    for (short row = 0; row < N_R0_SPLITQ; ++row) {
        const float sum = simd_sum(sums[row]);

        if (tiisg == 0 && r0 + row < args.ne01) {
            out[r0 + row] = sum;
        }
    }
}

template<short bits, bool windows>
kernel void splitq_mul_mv(
        constant ggml_metal_kargs_mul_mv & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        threadgroup  char * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    splitq_mul_mv_impl<bits, windows, constant ggml_metal_kargs_mul_mv &>(args, src0, src1, dst, shmem, tgpig, tiisg, sgitg);
}

// The kernels, by the names that the host asks for; each list stands at the end of the file of upstream's that has the templates.
#define SPLITQ_STRING(text) #text
#define SPLITQ_KERNEL(name) template [[host_name(SPLITQ_STRING(kernel_##name))]] kernel
#define SPLITQ_EACH(X)      X(sq4, 4, false) X(sq3, 3, false) X(sq2, 2, false) \
                            X(sq6w, 6, true) X(sq5w, 5, true) X(sq4w, 4, true) X(sq3w, 3, true) X(sq2w, 2, true)

#define SPLITQ_MUL_MM_OF(prefix, name, bits, windows, y, ...)                                                         \
    SPLITQ_KERNEL(prefix##_##name##_##y) prefix##_splitq_t kernel_##prefix<half, half4x4, simdgroup_half8x8, half, half2x4, \
        simdgroup_half8x8, splitq_block<bits, windows>, 2, splitq_dequantize, float, float4x4, __VA_ARGS__>;
#define SPLITQ_MUL_MM_ALL(name, bits, windows)                             \
    SPLITQ_MUL_MM_OF(mul_mm,    name, bits, windows, f32, float, float2x4) \
    SPLITQ_MUL_MM_OF(mul_mm,    name, bits, windows, f16, half,  half2x4)  \
    SPLITQ_MUL_MM_OF(mul_mm_id, name, bits, windows, f32, float, float2x4) \
    SPLITQ_MUL_MM_OF(mul_mm_id, name, bits, windows, f16, half,  half2x4)
#define SPLITQ_MUL_MM_KERNELS                 \
    typedef mul_mm_t  mul_mm_splitq_t;        \
    typedef mul_mm_id mul_mm_id_splitq_t;     \
    SPLITQ_EACH(SPLITQ_MUL_MM_ALL)

#define SPLITQ_MUL_MV_ALL(name, bits, windows)                                          \
    SPLITQ_KERNEL(mul_mv_##name##_f32)    splitq_mul_mv_t splitq_mul_mv<bits, windows>; \
    SPLITQ_KERNEL(mul_mv_id_##name##_f32) kernel_mul_mv_id_t kernel_mul_mv_id<mmv_fn<splitq_mul_mv_impl<bits, windows>>>;
#define SPLITQ_MUL_MV_KERNELS                                  \
    typedef decltype(splitq_mul_mv<4, false>) splitq_mul_mv_t; \
    SPLITQ_EACH(SPLITQ_MUL_MV_ALL)

#define SPLITQ_GET_ROWS_ALL(name, bits, windows) \
    SPLITQ_KERNEL(get_rows_##name) get_rows_q_t kernel_get_rows_q<splitq_block<bits, windows>, 2, splitq_dequantize>;
#define SPLITQ_GET_ROWS_KERNELS SPLITQ_EACH(SPLITQ_GET_ROWS_ALL)
