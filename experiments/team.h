// SPDX-License-Identifier: MIT
// Threads that do the same at once, timed: the best of several passes.
#include <pthread.h>
#include <time.h>

#define PASSES 8
#define MOST   256 // threads

struct member {
    pthread_t id;
    void (*work)(void * own);
    void * own;
    double best; // seconds of the fastest pass, from its own start to the last member's end
};

static pthread_barrier_t barrier;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec*1e-9;
}

static void * passes(void * arg) {
    struct member * m = arg;
    m->best = 1e9;
    for (int pass = 0; pass < PASSES; ++pass) {
        pthread_barrier_wait(&barrier);
        const double start = seconds();
        m->work(m->own);
        pthread_barrier_wait(&barrier);
        const double taken = seconds() - start;
        m->best = taken < m->best ? taken : m->best;
    }
    return NULL;
}

// Seconds that `threads` threads take for `work`, each with its own argument.
static double fastest(int threads, void (*work)(void * own), void * const * own) {
    static struct member team[MOST];
    double slowest = 0;
    pthread_barrier_init(&barrier, NULL, threads);
    for (int i = 0; i < threads; ++i) {
        team[i].work = work, team[i].own = own[i];
        pthread_create(&team[i].id, NULL, passes, &team[i]);
    }
    for (int i = 0; i < threads; ++i) {
        pthread_join(team[i].id, NULL);
        slowest = team[i].best > slowest ? team[i].best : slowest;
    }
    pthread_barrier_destroy(&barrier);
    return slowest;
}
