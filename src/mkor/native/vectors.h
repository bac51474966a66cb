/* Vectors of floats, and a version of a function for each kind of processor. */

#ifndef MKOR_VECTORS_H
#define MKOR_VECTORS_H

#include <stdint.h>

#if !defined(__GNUC__)
#error "written with the vector extensions of GCC and Clang"
#endif

/* One version for any processor of this kind, others for those that can do more. */
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define MANY __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define MANY
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

#define LOAD(p) (*(const vec *)(p))
#define STORE(p) (*(vec *)(p))
#define INLINE static inline __attribute__((always_inline))

INLINE float total(const vec *v) {
    const half *h = (const half *)v, sum = h[0] + h[1];
    const quarter *q = (const quarter *)&sum, four = q[0] + q[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

MANY static float sum(const float *x, int64_t n) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 += LOAD(x + i), s1 += LOAD(x + i + LANES);
        s2 += LOAD(x + i + 2 * LANES), s3 += LOAD(x + i + 3 * LANES);
    }
    s0 += s1, s2 += s3, s0 += s2;
    float all = total(&s0);
    for (; i < n; i++) all += x[i];
    return all;
}

INLINE float dot(const float *x, const float *y, int64_t d) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) {
        s0 += LOAD(x + c) * LOAD(y + c), s1 += LOAD(x + c + LANES) * LOAD(y + c + LANES);
        s2 += LOAD(x + c + 2 * LANES) * LOAD(y + c + 2 * LANES);
        s3 += LOAD(x + c + 3 * LANES) * LOAD(y + c + 3 * LANES);
    }
    for (; c + LANES <= d; c += LANES) s0 += LOAD(x + c) * LOAD(y + c);
    s0 += s1, s2 += s3, s0 += s2;
    float all = total(&s0);
    for (; c < d; c++) all += x[c] * y[c];
    return all;
}

#endif
