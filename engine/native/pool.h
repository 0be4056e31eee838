// Threads that share the items of one parallel region at a time. A worker that sleeps is never waited for: whoever is
// awake does its share, so a busy neighbour costs speed, not stalls.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Pool {
    typedef void (*Body)(void *context, int thread, int item);
    int threads = 1;
    bool alone = false;  // the owner works by itself until this is false again
    Body body = nullptr;
    void *context = nullptr;
    int items = 0;
    int next = 0, inside = 0, closed = 1, epoch = 0, sleepers = 0, stopping = 0;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    pthread_t handles[256];
    struct Worker {
        Pool *pool;
        int index;
    } workers[256];

    void start(int count) {
        threads = 1;
        for (int i = 1; i < count && i < 256; i++) {
            workers[i] = {this, i};
            if (pthread_create(&handles[i], nullptr, enter, &workers[i])) break;
            threads++;
        }
    }
    int active() const { return alone ? 1 : threads; }
    void stop() {
        __atomic_store_n(&stopping, 1, __ATOMIC_SEQ_CST);
        ring();
        for (int i = 1; i < threads; i++) pthread_join(handles[i], nullptr);
    }
    // Runs body(context, thread, item) for every item, on as many threads as are awake.
    void run(Body what, void *with, int count) {
        if (active() == 1 || count == 1) {
            for (int item = 0; item < count; item++) what(with, 0, item);
            return;
        }
        body = what, context = with, items = count;
        __atomic_store_n(&next, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(&closed, 0, __ATOMIC_SEQ_CST);
        ring();
        take(0);
        __atomic_store_n(&closed, 1, __ATOMIC_SEQ_CST);
        for (int spins = 0; __atomic_load_n(&inside, __ATOMIC_SEQ_CST); spins++)
            if (spins < 20000) relax(); else sched_yield();
    }
    template <class F> void each(int count, F f) {
        run([](void *context, int thread, int item) { (*(F *)context)(thread, item); }, &f, count);
    }

  private:
    static const int patience = 2000;  // pauses before a worker sleeps: some tens of microseconds
    void take(int thread) {
        int item;
        while ((item = __atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST)) < items) body(context, thread, item);
    }
    void ring() {
        __atomic_fetch_add(&epoch, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) {
            pthread_mutex_lock(&mutex);
            pthread_cond_broadcast(&wake);
            pthread_mutex_unlock(&mutex);
        }
    }
    static void *enter(void *argument) {
        Worker *worker = (Worker *)argument;
        worker->pool->serve(worker->index);
        return nullptr;
    }
    void serve(int thread) {
        int seen = 0;
        while (!__atomic_load_n(&stopping, __ATOMIC_SEQ_CST)) {
            seen = await(seen);
            // Entering before looking at `closed`: the owner closes before it looks who is inside.
            __atomic_fetch_add(&inside, 1, __ATOMIC_SEQ_CST);
            if (!__atomic_load_n(&closed, __ATOMIC_SEQ_CST)) take(thread);
            __atomic_fetch_sub(&inside, 1, __ATOMIC_SEQ_CST);
        }
    }
    int await(int seen) {
        int now;
        for (int spins = 0; spins < patience; spins++) {
            if ((now = __atomic_load_n(&epoch, __ATOMIC_SEQ_CST)) != seen) return now;
            relax();
        }
        pthread_mutex_lock(&mutex);
        __atomic_fetch_add(&sleepers, 1, __ATOMIC_SEQ_CST);
        while ((now = __atomic_load_n(&epoch, __ATOMIC_SEQ_CST)) == seen) pthread_cond_wait(&wake, &mutex);
        __atomic_fetch_sub(&sleepers, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&mutex);
        return now;
    }
};
