/* A call of a layer: both of its sides, to where they are summed; see mkor/capture/site.py. */

#ifndef MKOR_CALLS_H
#define MKOR_CALLS_H

#include <stdlib.h>

#include "images.h"
#include "rows.h"

/* sums[k, d] = those of one side's parts; returns the sum of the squares of all entries. */
static double side_sums(const plan *s, int side, const float *x, float *sums) {
    const operand *from = &s->side[side];
    return from->im.channels ? patch_sums(x, &from->im, &s->p, sums)
                             : row_sums(x, from->d, &s->p, sums);
}

/* Adds a call's sums and numbers of rows to their places; into[side] = NULL leaves a side out.
   Returns whether there was memory. */
static int add_call(const plan *s, const float *const x[2], float *const into[2], float *meta) {
    int64_t k = s->p.k, widest = s->side[0].d > s->side[1].d ? s->side[0].d : s->side[1].d;
    float *sums = malloc(k * widest * sizeof(float));
    if (!sums) return 0;
    for (int side = 0; side < 2; side++) {
        if (!into[side]) continue;
        meta[side] += (float)side_sums(s, side, x[side], sums);
        for (int64_t i = 0; i < k * s->side[side].d; i++) into[side][i] += sums[i];
    }
    meta[META - 1] += s->total;
    for (int64_t j = 0; j < k; j++) meta[META + j] += rows_of(&s->p, j) * s->rows;
    free(sums);
    return 1;
}

#endif
