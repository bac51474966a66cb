/* Sums of patches and of output positions; see mkor/layers/convolution.py. */

#ifndef MKOR_IMAGES_H
#define MKOR_IMAGES_H

#include "rows.h"

/* Images [channels, height, width], a kernel's taps, its steps, the distance of its taps and the
   padding before, all by axis; and some lines of the output, which has `across` columns. */
typedef struct {
    long long channels, height, width, taps[2], stride[2], dilation[2], before[2];
    long long first, lines, across;
} images;

/* line[width] += those lines of a channel that lie under tap t of the chosen output lines, and
   squares[width] += their squares. */
INLINE void add_lines(const float *x, const images *im, int64_t t, float *restrict line,
                      float *restrict squares) {
    for (int64_t out = im->first; out < im->first + im->lines; out++) {
        int64_t y = out * im->stride[0] + t * im->dilation[0] - im->before[0];
        if (y < 0 || y >= im->height) continue;
        const float *restrict row = x + y * im->width;
        for (int64_t c = 0; c < im->width; c++) line[c] += row[c], squares[c] += row[c] * row[c];
    }
}

/* The sum of a line's entries under tap t, outside of which there are zeros; all is that of all. */
INLINE float under_tap(const float *line, float all, const images *im, int64_t t) {
    int64_t step = im->stride[1], start = t * im->dilation[1] - im->before[1];
    int64_t end = start + im->across * step;
    if (step == 1 && 2 * im->across > im->width) {
        for (int64_t c = 0; c < start && c < im->width; c++) all -= line[c];
        for (int64_t c = end < 0 ? 0 : end; c < im->width; c++) all -= line[c];
        return start < im->width && end > 0 ? all : 0;
    }
    float sum = 0;
    for (int64_t c = start; c < end; c += step)
        if (c >= 0 && c < im->width) sum += line[c];
    return sum;
}

INLINE float all_of(const float *line, int64_t wide) {
    vec sum = {0};
    for (int64_t c = 0; c < wide; c += LANES) sum += LOAD(line + c);
    return total(&sum);
}

/* sums[k, channels * taps] = summed patches of each part's images; returns that of all squares.
   line[2 wide] is for work, where wide is the width made a multiple of LANES. */
MANY static double patch_sums(const float *x, const images *im, const parts *p, int64_t wide,
                              float *line, float *sums) {
    int64_t area = im->height * im->width, taps = im->taps[0] * im->taps[1];
    double squares = 0;
    for (int64_t j = 0; j < p->k; j++) {
        const float *part = x + start_of(p, j) * im->channels * area;
        for (int64_t c = 0; c < im->channels; c++)
            for (int64_t t = 0; t < im->taps[0]; t++) {
                memset(line, 0, 2 * wide * sizeof(float));
                for (int64_t image = 0; image < rows_of(p, j); image++)
                    add_lines(part + (image * im->channels + c) * area, im, t, line, line + wide);
                float all = all_of(line, wide), all_squares = all_of(line + wide, wide);
                float *out = sums + (j * im->channels + c) * taps + t * im->taps[1];
                for (int64_t u = 0; u < im->taps[1]; u++) {
                    out[u] = under_tap(line, all, im, u);
                    squares += under_tap(line + wide, all_squares, im, u);
                }
            }
    }
    return squares;
}

/* sums[k, channels] = each part's images summed over the chosen lines, as wide as they are. */
MANY static double line_sums(const float *g, const images *im, const parts *p, float *sums) {
    int64_t area = im->height * im->width, n = im->lines * im->width;
    double squares = 0;
    for (int64_t j = 0; j < p->k; j++)
        for (int64_t c = 0; c < im->channels; c++) {
            double sum = 0;
            for (int64_t image = start_of(p, j); image < start_of(p, j) + rows_of(p, j); image++) {
                const float *x = g + (image * im->channels + c) * area + im->first * im->width;
                vec s = {0}, q = {0};
                int64_t i = 0;
                for (; i + LANES <= n; i += LANES) {
                    vec v = LOAD(x + i);
                    s += v, q += v * v;
                }
                for (; i < n; i++) s[0] += x[i], q[0] += x[i] * x[i];
                sum += total(&s), squares += total(&q);
            }
            sums[j * im->channels + c] = (float)sum;
        }
    return squares;
}

#endif
