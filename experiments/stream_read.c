// SPDX-License-Identifier: MIT
// Memory read bandwidth, in GB/s: the best of several passes in which THREADS threads read a buffer each, once through.
//   stream_read THREADS LARGE     LARGE 1: in pages of 2 MB where the system gives them
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define BYTES  ((size_t) 256 << 20) // of one thread, far more than the caches hold
#define PASSES 8

static pthread_barrier_t barrier;
static volatile uint64_t sink;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec*1e-9;
}

struct reader {
    pthread_t id;
    void *    buffer;
    double    best; // seconds of the fastest pass, from its own start to the last reader's end
};

static void * run(void * arg) {
    typedef uint64_t vector __attribute__((vector_size(64)));
    struct reader * r = arg;
    r->best = 1e9;
    for (int pass = 0; pass < PASSES; ++pass) {
        const vector * p = r->buffer;
        vector sum[4] = { 0 };
        pthread_barrier_wait(&barrier);
        const double start = seconds();
        for (size_t i = 0; i < BYTES/sizeof(vector); i += 4) {
            for (int j = 0; j < 4; ++j) { sum[j] ^= p[i + j]; }
        }
        sink = (sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0];
        pthread_barrier_wait(&barrier);
        const double taken = seconds() - start;
        r->best = taken < r->best ? taken : r->best;
    }
    return NULL;
}

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    static struct reader team[256];
    if (threads < 1 || threads > 256) {
        return 2;
    }
    pthread_barrier_init(&barrier, NULL, threads);
    for (int i = 0; i < threads; ++i) {
        team[i].buffer = aligned_alloc(2 << 20, BYTES);
#ifdef MADV_HUGEPAGE
        madvise(team[i].buffer, BYTES, argc > 2 && atoi(argv[2]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
        memset(team[i].buffer, 1, BYTES);
    }
    double slowest = 0;
    for (int i = 0; i < threads; ++i) { pthread_create(&team[i].id, NULL, run, &team[i]); }
    for (int i = 0; i < threads; ++i) {
        pthread_join(team[i].id, NULL);
        slowest = team[i].best > slowest ? team[i].best : slowest;
    }
    printf("%f\n", BYTES*(double) threads/slowest/1e9);
    return 0;
}
