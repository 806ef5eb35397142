// SPDX-License-Identifier: MIT
// AMX for x86-64 processors and Linux that have none: a tile instruction ends in SIGILL there, and is carried out by the handler, as
// Intel's manual defines it. Compiled into a program, or loaded before one: LD_PRELOAD. What the manual forbids stays a SIGILL.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define OWN __thread __attribute__((tls_model("initial-exec")))

static OWN struct { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
static OWN uint8_t tiles[8][16][64];

static float bf16(const uint8_t * x) {
    const uint8_t bits[4] = { 0, 0, x[0], x[1] };
    float value;
    memcpy(&value, bits, sizeof(value));
    return value;
}

// c += a*b; kind: the lowest bit says that bytes of b have a sign, the next one that those of a do; 4: bfloat16.
static int multiply(int c, int a, int b, int kind) {
    if (config.rows[c] != config.rows[a] || config.bytes[c] != config.bytes[b] || config.rows[b] != config.bytes[a]/4) {
        return 0;
    }
    for (int m = 0; m < config.rows[c]; ++m) {
        for (int n = 0; n < config.bytes[c]/4; ++n) {
            uint8_t * to = tiles[c][m] + 4*n;
            float even = 0, odd = 0, f;
            int32_t sum;
            memcpy(&sum, to, sizeof(sum));
            memcpy(&f, to, sizeof(f));
            for (int k = 0; k < config.bytes[a]/4; ++k) {
                const uint8_t * x = tiles[a][m] + 4*k, * y = tiles[b][k] + 4*n;
                if (kind == 4) {
                    even += bf16(x)*bf16(y);
                    odd  += bf16(x + 2)*bf16(y + 2);
                }
                for (int i = 0; i < 4; ++i) { sum += (kind & 2 ? (int8_t) x[i] : x[i])*(kind & 1 ? (int8_t) y[i] : y[i]); }
            }
            f += even + odd;
            memcpy(to, kind == 4 ? (void *) &f : &sum, 4);
        }
    }
    return 1;
}

static void carry_out(int number, siginfo_t * info, void * context) {
    static const int registers[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    (void) info;
    greg_t * r = ((ucontext_t *) context)->uc_mcontext.gregs;
    const uint8_t * at = (const uint8_t *) r[REG_RIP], * next = at + 5; // C4, RXBmmmmm, WvvvvLpp, opcode, ModRM
    const int mod = at[4] >> 6, tile = at[4] >> 3 & 7, low = at[4] & 7, above = ~at[1] >> 5 & 1;
    int ok = at[0] == 0xc4 && (at[1] & 0x1f) == 2 && !(at[2] & 0x84); // three bytes of VEX, 0F38, W0, 128 bits
    int64_t address = 0, stride = 0;
    int32_t offset = 0;
    if (ok && mod < 3) {
        const int sib = low == 4 ? *next++ : 0, base = low == 4 ? sib & 7 : low, index = (sib >> 3 & 7) + 8*(~at[1] >> 6 & 1);
        const int none = mod == 0 && base == 5, wide = mod == 1 ? 1 : mod == 2 || none ? 4 : 0;
        if (wide == 1) { offset = (int8_t) *next; }
        if (wide == 4) { memcpy(&offset, next, 4); }
        next += wide;
        if (low == 4 && index != 4) { stride = r[registers[index]] << (sib >> 6); }
        address = offset + (!none ? r[registers[base + 8*above]] : low == 5 ? (int64_t) next : 0);
    }
    _mm_setcsr(0x9fc0); // denormals are zero, exceptions masked; ends with the handler
    const int rows = config.rows[tile], bytes = config.bytes[tile], prefix = at[2] & 3; // none, 66, F3, F2
    switch (ok ? at[3] << 4 | prefix << 1 | (mod == 3) : 0) {
        case 0x491: memset(&config, 0, sizeof(config)); memset(tiles, 0, sizeof(tiles)); break;                                  // TILERELEASE
        case 0x490: memcpy(&config, (void *) (address + stride), 64); memset(tiles, 0, sizeof(tiles)); break;                    // LDTILECFG
        case 0x492: memcpy((void *) (address + stride), &config, 64); break;                                                     // STTILECFG
        case 0x497: ok = rows > 0; memset(tiles[tile], 0, sizeof(tiles[tile])); break;                                           // TILEZERO
        case 0x4b2: case 0x4b6: ok = rows > 0; memset(tiles[tile], 0, sizeof(tiles[tile]));                                      // TILELOADD
                    for (int i = 0; i < rows; ++i) { memcpy(tiles[tile][i], (void *) (address + i*stride), bytes); } break;
        case 0x4b4: ok = rows > 0; for (int i = 0; i < rows; ++i) { memcpy((void *) (address + i*stride), tiles[tile][i], bytes); } break; // TILESTORED
        case 0x5c5: ok = multiply(tile, low, ~at[2] >> 3 & 7, 4); break;                                                         // TDPBF16PS
        case 0x5e1: case 0x5e3: case 0x5e5: case 0x5e7: ok = multiply(tile, low, ~at[2] >> 3 & 7, prefix); break; // TDPBUUD, BUSD, BSUD, BSSD
        default: ok = 0;
    }
    r[REG_RIP] = ok ? (greg_t) next : r[REG_RIP];
    if (!ok) { signal(number, SIG_DFL); } // and again, to its end
}

__attribute__((constructor)) static void begin(void) {
    const struct sigaction action = { .sa_sigaction = carry_out, .sa_flags = SA_SIGINFO };
    sigaction(SIGILL, &action, NULL);
}

// Linux's leave to use tiles, which ARCH_REQ_XCOMP_PERM asks for, is given.
long syscall(long number, ...) {
    long a[6];
    va_list args;
    va_start(args, number);
    for (int i = 0; i < 6; ++i) { a[i] = va_arg(args, long); }
    va_end(args);
    long (*real)(long, ...) = (long (*)(long, ...)) dlsym(RTLD_NEXT, "syscall");
    return number == SYS_arch_prctl && a[0] == 0x1023 ? 0 : real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
