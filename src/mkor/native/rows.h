/* Sums of rows by parts; see mkor/layers/rows.py and mkor/layers/linear.py. */

#ifndef MKOR_ROWS_H
#define MKOR_ROWS_H

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

/* Rows that are added up before their sum is added to others': long sums lose digits. */
#define FEW 64

/* Adds a row to sum[d]; returns the sum of its entries' squares. */
INLINE float add_row(const float *x, int64_t d, float *sum) {
    vec q0 = {0}, q1 = {0};
    int64_t c = 0;
    for (; c + 2 * LANES <= d; c += 2 * LANES) {
        vec v0 = LOAD(x + c), v1 = LOAD(x + c + LANES);
        STORE(sum + c) += v0, STORE(sum + c + LANES) += v1;
        q0 += v0 * v0, q1 += v1 * v1;
    }
    for (; c + LANES <= d; c += LANES) {
        vec v = LOAD(x + c);
        STORE(sum + c) += v, q0 += v * v;
    }
    q0 += q1;
    float squares = total(&q0);
    for (; c < d; c++) sum[c] += x[c], squares += x[c] * x[c];
    return squares;
}

INLINE int64_t rows_of(const parts *p, int64_t j) { return (p->size + (j < p->extra)) * p->unit; }

INLINE int64_t start_of(const parts *p, int64_t j) {
    return (p->offset + j * p->stride + (j < p->extra ? j : p->extra)) * p->unit;
}

/* Adds rows [n, d] to sum[d] one after the other, which is how memory is read fastest. `some` holds
   d numbers, or is NULL where there are few rows, or no memory for them. */
static double add_rows(const float *x, int64_t n, int64_t d, float *some, float *sum) {
    double squares = 0;
    for (int64_t row = 0; row < n;) {
        int64_t end = some && row + FEW < n ? row + FEW : n;
        float *into = some ? some : sum;
        if (some) memset(some, 0, d * sizeof(float));
        for (; row < end; row++) squares += add_row(x + row * d, d, into);
        for (int64_t c = 0; some && c < d; c++) sum[c] += some[c];
    }
    return squares;
}

/* sums[k, d] = the sum of each part's rows; returns that of the squares of all their entries. */
static double row_sums(const float *x, int64_t d, const parts *p, float *sums) {
    double squares = 0;
    float *some = rows_of(p, 0) > FEW ? malloc(d * sizeof(float)) : NULL;
    memset(sums, 0, p->k * d * sizeof(float));
    for (int64_t j = 0; j < p->k; j++)
        squares += add_rows(x + start_of(p, j) * d, rows_of(p, j), d, some, sums + j * d);
    free(some);
    return squares;
}

#endif
