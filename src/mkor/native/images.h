/* Sums of the patches of images; see mkor/layers/convolution.py. */

#ifndef MKOR_IMAGES_H
#define MKOR_IMAGES_H

#include "rows.h"

/* The lines of an image that lie under tap t of the chosen output lines: from y, n of them. */
INLINE int64_t lines_under(const images *im, int64_t t, int64_t *y) {
    int64_t start = im->first + t * im->dilation[0] - im->before[0], end = start + im->lines;
    *y = start < 0 ? 0 : start;
    return (end > im->height ? im->height : end) - *y;
}

/* Columns [from, to) of n lines; adds their squares to *squares. */
INLINE float columns(const float *x, int64_t width, int64_t n, int64_t from, int64_t to,
                     double *squares) {
    float sum = 0, found = 0;
    for (int64_t c = from < 0 ? 0 : from; c < to && c < width; c++)
        for (int64_t y = 0; y < n; y++) {
            float v = x[y * width + c];
            sum += v, found += v * v;
        }
    *squares += found;
    return sum;
}

/* out[taps] += the patches of one channel of an image, where steps are 1: under tap (t, u) there are
   some columns of some lines, mostly all but a few at their ends. Returns the sum of squares, for
   all taps together: those of all columns, as often as they are used, but for the ends'. */
INLINE double add_patches(const float *x, const images *im, float *out) {
    double squares = 0, off = 0;
    int most = 2 * im->across > im->width;
    for (int64_t t = 0; t < im->taps[0]; t++) {
        int64_t y, lines = lines_under(im, t, &y), n = lines * im->width, i = 0, used = 0;
        if (lines <= 0) continue;
        const float *block = x + y * im->width;
        vec s = {0}, q = {0};
        for (; i + LANES <= n; i += LANES) {
            vec v = LOAD(block + i);
            s += v, q += v * v;
        }
        for (; i < n; i++) s[0] += block[i], q[0] += block[i] * block[i];
        float all = total(&s);
        for (int64_t u = 0; u < im->taps[1]; u++) {
            int64_t start = u * im->dilation[1] - im->before[1], end = start + im->across;
            if (start >= im->width || end <= 0) continue;
            if (!most) {
                out[t * im->taps[1] + u] += columns(block, im->width, lines, start, end, &squares);
                continue;
            }
            used++;
            out[t * im->taps[1] + u] += all - columns(block, im->width, lines, 0, start, &off) -
                                        columns(block, im->width, lines, end, im->width, &off);
        }
        squares += used * (double)total(&q);
    }
    return squares - off;
}

/* Columns whose sums are kept at a time. */
#define SOME 256

/* The same with any steps: lines are summed first, then every so many of their columns. */
INLINE double add_strided(const float *x, const images *im, float *out) {
    float line[SOME], square[SOME];
    double squares = 0;
    int64_t step = im->stride[1];
    for (int64_t t = 0; t < im->taps[0]; t++)
        for (int64_t c = 0; c < im->width; c += SOME) {
            int64_t n = im->width - c < SOME ? im->width - c : SOME;
            memset(line, 0, n * sizeof(float)), memset(square, 0, n * sizeof(float));
            for (int64_t at = im->first; at < im->first + im->lines; at++) {
                int64_t y = at * im->stride[0] + t * im->dilation[0] - im->before[0];
                if (y < 0 || y >= im->height) continue;
                const float *row = x + y * im->width + c;
                for (int64_t i = 0; i < n; i++) line[i] += row[i], square[i] += row[i] * row[i];
            }
            for (int64_t u = 0; u < im->taps[1]; u++) {
                int64_t start = u * im->dilation[1] - im->before[1] - c, end = start + im->across * step;
                float sum = 0, found = 0;
                if (start < 0) start = (start % step + step) % step;
                for (int64_t i = start; i < end && i < n; i += step) sum += line[i], found += square[i];
                out[t * im->taps[1] + u] += sum, squares += found;
            }
        }
    return squares;
}

/* Channels from the one that is read to one that is asked for in advance: they are too far apart for
   the processor to see what comes next; of long stretches it sees the rest. */
#define AHEAD 2
#define CACHE_LINE 16
#define ENOUGH (32 * CACHE_LINE)

INLINE void ask_for(const float *x, const images *im) {
    int64_t first = im->first * im->stride[0] - im->before[0];
    int64_t lines = (im->lines - 1) * im->stride[0] + (im->taps[0] - 1) * im->dilation[0] + 1;
    int64_t n = lines * im->width < ENOUGH ? lines * im->width : ENOUGH;
    const float *start = x + (first < 0 ? 0 : first) * im->width;
    for (int64_t i = 0; i < n; i += CACHE_LINE) __builtin_prefetch(start + i);
}

/* sums[k, channels * taps] = summed patches of each part's images; returns that of all squares. */
static double patch_sums(const float *x, const images *im, const parts *p, float *sums) {
    int64_t area = im->height * im->width, taps = im->taps[0] * im->taps[1];
    int plain = im->stride[0] == 1 && im->stride[1] == 1;
    double squares = 0;
    memset(sums, 0, p->k * im->channels * taps * sizeof(float));
    for (int64_t j = 0; j < p->k; j++)
        for (int64_t image = start_of(p, j); image < start_of(p, j) + rows_of(p, j); image++)
            for (int64_t c = 0; c < im->channels; c++) {
                const float *channel = x + (image * im->channels + c) * area;
                float *out = sums + (j * im->channels + c) * taps;
                ask_for(channel + AHEAD * area, im);
                squares += plain ? add_patches(channel, im, out) : add_strided(channel, im, out);
            }
    return squares;
}

#endif
