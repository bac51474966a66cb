/* Small gradients side by side, and back; see mkor/step/gradients.py. */

#ifndef MKOR_GRADIENTS_H
#define MKOR_GRADIENTS_H

#include <math.h>
#include <string.h>

#include "vectors.h"

/* Squares that are added up in single precision. */
#define FEW_SQUARES 4096

/* sqrt(|W_i|^2 + |b_i|^2) of a layer. */
INLINE float joint_norm(const stack *s, int64_t i) {
    const float *W = s->W + i * s->n, *b = s->b + i * s->m;
    double squares = s->m ? dot(b, b, s->m) : 0;
    for (int64_t c = 0; c < s->n; c += FEW_SQUARES)
        squares += dot(W + c, W + c, s->n - c < FEW_SQUARES ? s->n - c : FEW_SQUARES);
    return (float)sqrt(squares);
}

static void joint_norms(const stack *s, float *norm) {
    for (int64_t i = 0; i < s->B; i++) norm[i] = joint_norm(s, i);
}

/* Copies them side by side, and takes their norms. */
static void gather(const stack *s, float *norm) {
    for (int64_t i = 0; i < s->B; i++) {
        memcpy(s->W + i * s->n, s->home[i], s->n * sizeof(float));
        if (s->m) memcpy(s->b + i * s->m, s->home[s->B + i], s->m * sizeof(float));
        norm[i] = joint_norm(s, i);
    }
}

/* Each layer's entries times its ratio, to where they came from. */
static void scatter(const stack *s, const float *ratio) {
    for (int64_t i = 0; i < s->B; i++) {
        float *restrict W = s->home[i];
        for (int64_t c = 0; c < s->n; c++) W[c] = ratio[i] * s->W[i * s->n + c];
        if (!s->m) continue;
        float *restrict b = s->home[s->B + i];
        for (int64_t c = 0; c < s->m; c++) b[c] = ratio[i] * s->b[i * s->m + c];
    }
}

#endif
