/* The limit that bench_step.py measures a step against: three arrays read, two of them written, in place.
   Chunks are taken off a shared counter, as in the optimizer's own engine. */

#define CHUNK 65536

__attribute__((target_clones("avx512f", "avx2", "default")))
static void stream_chunk(float *restrict p, float *restrict m, const float *restrict g, long count) {
    for (long i = 0; i < count; i++) {
        p[i] = p[i] - g[i] * 1e-9f;
        m[i] = m[i] + g[i] * 1e-9f;
    }
}

void stream(float *p, float *m, const float *g, long count, long *next) {
    for (;;) {
        long start = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED) * CHUNK;
        if (start >= count) return;
        long left = count - start;
        stream_chunk(p + start, m + start, g + start, left < CHUNK ? left : CHUNK);
    }
}
