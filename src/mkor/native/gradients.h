/* Small gradients side by side, and back; see mkor/step/gradients.py. */

#ifndef MKOR_GRADIENTS_H
#define MKOR_GRADIENTS_H

#include <math.h>
#include <string.h>

#include "vectors.h"

/* Gradients of B layers: n entries of each weight in W [B, n], m of each bias in b [B, m], where m
   may be 0; and where they came from, all weights and then all biases. */
typedef struct {
    long long B, n, m;
    float *W, *b;
    float **home;
} stack;

/* Squares that are added up in single precision. */
#define FEW_SQUARES 4096

INLINE float squares_of(const float *x, int64_t n) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        vec a = LOAD(x + i), b = LOAD(x + i + LANES);
        vec c = LOAD(x + i + 2 * LANES), d = LOAD(x + i + 3 * LANES);
        s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
    }
    s0 += s1, s2 += s3, s0 += s2;
    float all = total(&s0);
    for (; i < n; i++) all += x[i] * x[i];
    return all;
}

/* sqrt(|W_i|^2 + |b_i|^2) of a layer. */
INLINE float joint_norm(const stack *s, int64_t i) {
    const float *W = s->W + i * s->n, *b = s->b + i * s->m;
    double squares = s->m ? squares_of(b, s->m) : 0;
    for (int64_t c = 0; c < s->n; c += FEW_SQUARES)
        squares += squares_of(W + c, s->n - c < FEW_SQUARES ? s->n - c : FEW_SQUARES);
    return (float)sqrt(squares);
}

MANY static void joint_norms(const stack *s, float *norm) {
    for (int64_t i = 0; i < s->B; i++) norm[i] = joint_norm(s, i);
}

/* Copies them side by side, and takes their norms. */
MANY static void gather(const stack *s, float *norm) {
    for (int64_t i = 0; i < s->B; i++) {
        memcpy(s->W + i * s->n, s->home[i], s->n * sizeof(float));
        if (s->m) memcpy(s->b + i * s->m, s->home[s->B + i], s->m * sizeof(float));
        norm[i] = joint_norm(s, i);
    }
}

/* Each layer's entries times its ratio, to where they came from. */
MANY static void scatter(const stack *s, const float *ratio) {
    for (int64_t i = 0; i < s->B; i++) {
        float *restrict W = s->home[i];
        for (int64_t c = 0; c < s->n; c++) W[c] = ratio[i] * s->W[i * s->n + c];
        if (!s->m) continue;
        float *restrict b = s->home[s->B + i];
        for (int64_t c = 0; c < s->m; c++) b[c] = ratio[i] * s->b[i * s->m + c];
    }
}

#endif
