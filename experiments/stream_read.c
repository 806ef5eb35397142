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

static void * reader(void * buffer) {
    typedef uint64_t vector __attribute__((vector_size(64)));
    for (int pass = 0; pass < PASSES; ++pass) {
        const vector * p = buffer;
        vector sum[4] = { 0 };
        pthread_barrier_wait(&barrier);
        for (size_t i = 0; i < BYTES/sizeof(vector); i += 4) {
            for (int j = 0; j < 4; ++j) { sum[j] ^= p[i + j]; }
        }
        sink = (sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0];
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    pthread_t team[256];
    if (threads < 1 || threads > 256) {
        return 2;
    }
    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (int i = 0; i < threads; ++i) {
        void * buffer = aligned_alloc(2 << 20, BYTES);
#ifdef MADV_HUGEPAGE
        madvise(buffer, BYTES, argc > 2 && atoi(argv[2]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
        memset(buffer, 1, BYTES);
        pthread_create(&team[i], NULL, reader, buffer);
    }
    double best = 0;
    for (int pass = 0; pass < PASSES; ++pass) {
        struct timespec a, b;
        pthread_barrier_wait(&barrier);
        clock_gettime(CLOCK_MONOTONIC, &a);
        pthread_barrier_wait(&barrier);
        clock_gettime(CLOCK_MONOTONIC, &b);
        const double rate = BYTES*(double) threads/((b.tv_sec - a.tv_sec)*1e9 + (b.tv_nsec - a.tv_nsec));
        best = rate > best ? rate : best;
    }
    printf("%f\n", best);
    return 0;
}
