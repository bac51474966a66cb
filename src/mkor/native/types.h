/* What Python hands over; arrays are dense. */

#ifndef MKOR_TYPES_H
#define MKOR_TYPES_H

#include <stdint.h>

/* Numbers that lead a layer's counts: squares of a and of g, rows of the whole step. */
#define META 3

/* Part j has size + (j < extra) samples of unit rows each, from offset + j stride + min(j, extra). */
typedef struct {
    long long k, size, stride, offset, extra, unit;
} parts;

/* Images [channels, height, width], a kernel's taps, its steps, the distance of its taps and the
   padding before, all by axis; and some lines of the output, which has `across` columns. */
typedef struct {
    long long channels, height, width, taps[2], stride[2], dilation[2], before[2];
    long long first, lines, across;
} images;

/* Inputs or output gradients: rows of d entries, or images whose patches have as many. */
typedef struct {
    long long d;
    images im;
} operand;

/* How calls of one shape are summed: parts of the samples, each of which has so many rows (of
   images, patches), and the rows of a call, used or not. Python fills it number by number. */
typedef struct {
    parts p;
    long long rows, total;
    operand side[2];
} plan;

/* Gradients of B layers: n entries of each weight in W [B, n], m of each bias in b [B, m], where m
   may be 0; and where they came from, all weights and then all biases. */
typedef struct {
    long long B, n, m;
    float *W, *b;
    float **home;
} stack;

/* One side of a batch of windows: sums [B, k, d] of each vector's rows, what makes them means [B, k],
   and mean squares [B] that come; ring [B, r, d], gram [B, r, r] and running mean squares [B] that
   they change. */
typedef struct {
    int64_t d;
    const float *sums, *scale, *square;
    float *ring, *gram, *average;
} side;

#endif
