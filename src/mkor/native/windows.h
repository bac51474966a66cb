/* The window factor: rings and their Gram matrices, whitening, what it does to a bias; see
   mkor/curvature/ring.py and mkor/linalg/windows.py. */

#ifndef MKOR_WINDOWS_H
#define MKOR_WINDOWS_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

/* Gram matrix: products of a ring's rows [r, d] with four of them, into their rows and columns. */
INLINE void four_products(const float *ring, int64_t r, int64_t d, const int64_t *places, int64_t n,
                          float *gram) {
    const float *y[4];
    for (int j = 0; j < 4; j++) y[j] = ring + places[j < n ? j : 0] * d;
    for (int64_t i = 0; i < r; i++) {
        const float *x = ring + i * d;
        vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            vec v = LOAD(x + c);
            a0 += v * LOAD(y[0] + c), a1 += v * LOAD(y[1] + c);
            a2 += v * LOAD(y[2] + c), a3 += v * LOAD(y[3] + c);
        }
        float dot[4] = {total(&a0), total(&a1), total(&a2), total(&a3)};
        for (; c < d; c++)
            for (int j = 0; j < 4; j++) dot[j] += x[c] * y[j][c];
        for (int j = 0; j < n; j++) {
            gram[places[j] * r + i] = dot[j];
            gram[i * r + places[j]] = dot[j];
        }
    }
}

static void write_ring(const float *sums, const float *scale, const int64_t *slots,
                       const int64_t *places, int64_t n, int64_t r, int64_t d, float *ring,
                       float *gram) {
    for (int64_t j = 0; j < n; j++) {
        float *restrict to = ring + places[j] * d;
        const float *from = sums + slots[j] * d;
        for (int64_t c = 0; c < d; c++) to[c] = scale[slots[j]] * from[c];
    }
    for (int64_t j = 0; j < n; j += 4)
        four_products(ring, r, d, places + j, n - j < 4 ? n - j : 4, gram);
}

/* Ages each layer's window and writes its new vectors; layers that do not accept stay as they are.
   filled [B, k], weights [B, r]. Returns whether there was memory. */
static int update_window(int64_t B, int64_t k, int64_t r, double gamma, const uint8_t *filled,
                         const uint8_t *accept, int64_t *updates, int64_t *written, float *weights,
                         const side *sides, int count) {
    int64_t *slots = malloc(2 * k * sizeof(int64_t)), *places = slots + k;
    if (!slots) return 0;
    for (int64_t b = 0; b < B; b++) {
        if (!accept[b]) continue;
        int64_t made = 0;
        for (int64_t slot = 0; slot < k; slot++)
            if (filled[b * k + slot]) {
                slots[made] = slot;
                places[made] = (written[b] + made) % r;
                made++;
            }
        float *w = weights + b * r;
        for (int64_t i = 0; i < r; i++) w[i] *= (float)gamma;
        for (int64_t j = 0; j < made; j++) w[places[j]] = (float)((1 - gamma) / made);
        for (const side *s = sides; s < sides + count; s++) {
            write_ring(s->sums + b * k * s->d, s->scale + b * k, slots, places, made, r, s->d,
                       s->ring + b * r * s->d, s->gram + b * r * r);
            s->average[b] += (float)(1 - gamma) * (s->square[b] - s->average[b]);
        }
        written[b] += made;
        updates[b]++;
    }
    free(slots);
    return 1;
}

/* Columns are worked on in blocks that stay in registers. */
#define BLOCK (2 * LANES)
#define PADDED(r) (((r) + BLOCK - 1) / BLOCK * BLOCK)

/* row[c] -= sum_j factors[j apart] rows[j, c] over from <= j < to, for the BLOCK columns from c on. */
INLINE void subtract(float *row, const float *factors, int64_t apart, int64_t from, int64_t to,
                     const float *rows, int64_t wide, int64_t c) {
    vec a0 = LOAD(row + c), a1 = LOAD(row + c + LANES), b0 = {0}, b1 = {0};
    int64_t j = from;
    /* Two sums each: one would wait for itself. */
    for (; j + 2 <= to; j += 2) {
        float f = factors[j * apart], g = factors[(j + 1) * apart];
        const float *p = rows + j * wide + c, *q = p + wide;
        a0 -= f * LOAD(p), a1 -= f * LOAD(p + LANES);
        b0 -= g * LOAD(q), b1 -= g * LOAD(q + LANES);
    }
    if (j < to) {
        float f = factors[j * apart];
        a0 -= f * LOAD(rows + j * wide + c), a1 -= f * LOAD(rows + j * wide + c + LANES);
    }
    STORE(row + c) = a0 + b0, STORE(row + c + LANES) = a1 + b1;
}

/* A = K^-1 diag(s) for K K^T = I + diag(s) (gram + one) diag(s), s_i = sqrt(w_i / lambda); returns
   whether that is possible. T and X [r, PADDED(r)] hold K^T and K^-1. */
static int root(const float *gram, const float *weights, float lambda, float one, int64_t r,
                float *s, float *T, float *X, float *A) {
    int64_t wide = PADDED(r);
    for (int64_t i = 0; i < r; i++) s[i] = lambda > 0 ? sqrtf(weights[i] / lambda) : 0;
    memset(X, 0, r * wide * sizeof(float));
    for (int64_t i = 0; i < r; i++) {
        /* Whole blocks, though a row of T begins at its diagonal: what comes before is never read. */
        float *t = T + i * wide, *x = X + i * wide;
        int64_t begin = i / BLOCK * BLOCK;
        for (int64_t c = begin; c < r; c++) t[c] = s[i] * (gram[i * r + c] + one) * s[c];
        /* What is beyond r reaches nothing else, but should be numbers. */
        for (int64_t c = r; c < wide; c++) t[c] = 0;
        for (int64_t c = begin; c < r; c += BLOCK) subtract(t, T + i, wide, 0, i, T, wide, c);
        for (int64_t c = 0; c <= i; c += BLOCK) subtract(x, T + i, wide, c, i, X, wide, c);
        float square = t[i] + 1;
        if (!(square > 0 && square < INFINITY)) return 0;
        float scale = 1 / sqrtf(square);
        for (int64_t c = begin; c < wide; c++) t[c] *= scale;
        for (int64_t c = 0; c < begin + BLOCK; c++) x[c] *= scale;
        x[i] = scale;
    }
    for (int64_t i = 0; i < r; i++)
        for (int64_t c = 0; c < r; c++) A[i * r + c] = X[i * wide + c] * s[c];
    return 1;
}

/* The same for B layers with mean squares lambda / damping; A [B, r, r] is NaN where it is not
   possible. Returns whether there was memory. */
static int roots(int64_t B, int64_t r, const float *gram, const float *weights, float damping,
                 const float *squares, float one, float *A) {
    int64_t wide = PADDED(r);
    float *work = malloc((2 * r * wide + r) * sizeof(float));
    if (!work) return 0;
    for (int64_t b = 0; b < B; b++, gram += r * r, weights += r, A += r * r) {
        int good = root(gram, weights, damping * squares[b], one, r, work + 2 * r * wide, work,
                        work + r * wide, A);
        for (int64_t i = 0; !good && i < r * r; i++) A[i] = NAN;
    }
    free(work);
    return 1;
}

/* b [B, d] -= U^T (U b) for U [B, r, d]. Returns whether there was memory. */
static int remove_rows(int64_t B, int64_t r, int64_t d, const float *U, float *b) {
    float *x = malloc(r * sizeof(float));
    if (!x) return 0;
    for (; B > 0; B--, U += r * d, b += d) {
        for (int64_t i = 0; i < r; i++) x[i] = dot(U + i * d, b, d);
        for (int64_t i = 0; i < r; i++)
            for (int64_t c = 0; c < d; c++) b[c] -= x[i] * U[i * d + c];
    }
    free(x);
    return 1;
}

/* Y [B, d, r] += b u^T, then b [B, d] -= Y u. */
static void remove_bias(int64_t B, int64_t r, int64_t d, const float *u, float *Y, float *b) {
    for (; B > 0; B--, u += r, b += d)
        for (int64_t i = 0; i < d; i++, Y += r) {
            float entry = b[i];
            for (int64_t c = 0; c < r; c++) Y[c] += entry * u[c];
            b[i] -= dot(Y, u, r);
        }
}

#endif
