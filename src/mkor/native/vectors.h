/* Vectors of floats. */

#ifndef MKOR_VECTORS_H
#define MKOR_VECTORS_H

#include "types.h"

#if !defined(__GNUC__)
#error "written with the vector extensions of GCC and Clang"
#endif

/* LANES floats are as many as a register of the processor holds: compilers that must divide vectors
   keep the pieces in memory. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#define LOAD(p) (*(const vec *)(p))
#define STORE(p) (*(vec *)(p))
#define INLINE static inline __attribute__((always_inline))

INLINE float total(const vec *v) {
    const four *q = (const four *)v;
    four sum = q[0];
    for (int i = 1; i < LANES / 4; i++) sum += q[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static float sum(const float *x, int64_t n) {
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
