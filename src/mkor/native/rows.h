/* Sums of rows by parts; see mkor/layers/rows.py and mkor/layers/linear.py. */

#ifndef MKOR_ROWS_H
#define MKOR_ROWS_H

#include <string.h>

#include "vectors.h"

/* Rows that are added up before their sum is added to others': long sums lose digits, and memory is
   read in its order. */
#define FEW 4

/* Adds FEW rows to sum[d]; returns the sum of the squares of their entries. */
INLINE float add_rows(const float *x, int64_t d, float *sum) {
    vec q0 = {0}, q1 = {0}, q2 = {0}, q3 = {0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        const float *p = x + c;
        vec v0 = LOAD(p), v1 = LOAD(p + d), v2 = LOAD(p + 2 * d), v3 = LOAD(p + 3 * d);
        STORE(sum + c) += (v0 + v1) + (v2 + v3);
        q0 += v0 * v0, q1 += v1 * v1, q2 += v2 * v2, q3 += v3 * v3;
    }
    q0 += q1, q2 += q3, q0 += q2;
    float squares = total(&q0);
    for (; c < d; c++)
        for (int row = 0; row < FEW; row++) {
            float v = x[row * d + c];
            sum[c] += v, squares += v * v;
        }
    return squares;
}

/* The same with one row. */
INLINE float add_row(const float *x, int64_t d, float *sum) {
    vec q = {0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        vec v = LOAD(x + c);
        STORE(sum + c) += v, q += v * v;
    }
    float squares = total(&q);
    for (; c < d; c++) sum[c] += x[c], squares += x[c] * x[c];
    return squares;
}

INLINE int64_t rows_of(const parts *p, int64_t j) { return (p->size + (j < p->extra)) * p->unit; }

INLINE int64_t start_of(const parts *p, int64_t j) {
    return (p->offset + j * p->stride + (j < p->extra ? j : p->extra)) * p->unit;
}

/* sums[k, d] = the sum of each part's rows; returns that of the squares of all their entries. */
static double row_sums(const float *x, int64_t d, const parts *p, float *sums) {
    double squares = 0;
    for (int64_t j = 0; j < p->k; j++) {
        int64_t start = start_of(p, j), rows = rows_of(p, j);
        memset(sums + j * d, 0, d * sizeof(float));
        int64_t row = 0;
        for (; row + FEW <= rows; row += FEW)
            squares += add_rows(x + (start + row) * d, d, sums + j * d);
        for (; row < rows; row++) squares += add_row(x + (start + row) * d, d, sums + j * d);
    }
    return squares;
}

#endif
