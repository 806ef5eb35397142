// SPDX-License-Identifier: MIT
// Memory read bandwidth, in GB/s: the best of several passes in which THREADS threads read a buffer each, once through.
//   stream_read THREADS LARGE     LARGE 1: in pages of 2 MB where the system gives them
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "team.h"

#define BYTES ((size_t) 256 << 20) // of one thread, far more than the caches hold

static volatile uint64_t sink;

static void read_through(void * buffer) {
    typedef uint64_t vector __attribute__((vector_size(64)));
    const vector * p = buffer;
    vector sum[4] = { 0 };
    for (size_t i = 0; i < BYTES/sizeof(vector); i += 4) {
        for (int j = 0; j < 4; ++j) { sum[j] ^= p[i + j]; }
    }
    sink = (sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0];
}

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    static void * buffers[MOST];
    if (threads < 1 || threads > MOST) {
        return 2;
    }
    for (int i = 0; i < threads; ++i) {
        buffers[i] = aligned_alloc(2 << 20, BYTES);
#ifdef MADV_HUGEPAGE
        madvise(buffers[i], BYTES, argc > 2 && atoi(argv[2]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
        memset(buffers[i], 1, BYTES);
    }
    printf("%f\n", BYTES*(double) threads/fastest(threads, read_through, buffers)/1e9);
    return 0;
}
