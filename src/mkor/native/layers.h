/* What is a number per layer; see mkor/step/roster.py and mkor/step/application.py. */

#ifndef MKOR_LAYERS_H
#define MKOR_LAYERS_H

#include <math.h>

#include "types.h"

/* Which of the layers in meta [N, width] had data, whose squares and gradients are finite, and
   whether any layer's are not. */
static void check_layers(int64_t N, int64_t width, const float *meta, const float *norms,
                         uint8_t *seen, uint8_t *finite, uint8_t *bad) {
    *bad = 0;
    for (int64_t i = 0; i < N; i++, meta += width) {
        seen[i] = meta[META - 1] > 0;
        /* None is negative, and NaN is not below infinity. */
        finite[i] = meta[0] + meta[1] + norms[i] < INFINITY;
        *bad |= !finite[i];
    }
}

/* widths [3, N]: d_out, d_in with the column of ones, whether there is one. numbers [4 + 2k, N] is
   filled with used rows, scales of raw g, mean squares of both sides, then what makes means of the
   sums of a and of raw g, for each vector by layer; fed is a copy of seen. Returns whether all
   layers accept all slots. */
static int count_layers(int64_t N, int64_t k, float factor, int refuse, const float *meta,
                        const float *widths, const uint8_t *seen, float *numbers, uint8_t *filled,
                        uint8_t *accept, uint8_t *fed) {
    const float *d_out = widths, *d_in = d_out + N, *ones = d_in + N;
    float *used = numbers, *scale = used + N, *left = scale + N, *right = left + N;
    float *a_means = right + N, *g_means = a_means + N * k;
    int whole = 1;
    for (int64_t i = 0; i < N; i++, meta += META + k) {
        const float *counts = meta + META;
        float n = 0;
        scale[i] = meta[META - 1] * factor;
        for (int64_t j = 0; j < k; j++) {
            n += counts[j];
            a_means[i * k + j] = 1 / (counts[j] < 1 ? 1 : counts[j]);
            g_means[i * k + j] = scale[i] * a_means[i * k + j];
            filled[i * k + j] = counts[j] > 0;
            whole &= filled[i * k + j];
        }
        used[i] = n < 1 ? 1 : n;
        left[i] = meta[1] * (scale[i] * scale[i]) / (used[i] * d_out[i]);
        right[i] = (meta[0] + used[i] * ones[i]) / (used[i] * d_in[i]);
        fed[i] = seen[i];
        accept[i] = seen[i] && !refuse;
        whole &= accept[i];
    }
    return whole;
}

/* Which layers have factors to use; where a step is due, only with data that is finite. ok: those
   whose gradient is finite, too. */
static void usable_layers(int64_t N, int due, const int64_t *updates, const uint8_t *seen,
                          const uint8_t *finite, const float *norms, uint8_t *use, uint8_t *ok) {
    for (int64_t i = 0; i < N; i++) {
        use[i] = updates[i] > 0 && (!due || (seen[i] && finite[i]));
        ok[i] = use[i] && norms[i] < INFINITY;
    }
}

/* What preconditioned gradients are multiplied with: the ratio of the norms before and after, or of
   their running averages [N, 2], which move; 1 where it is no number, or nothing was done. The norm
   and what was done are kept in last and in all_done. Returns whether everything was done. */
static int norm_ratios(int64_t N, int running, float gamma, float *average, const float *raw,
                       const float *norm, const uint8_t *done, float *last, uint8_t *all_done,
                       float *ratio) {
    int whole = 1;
    for (int64_t i = 0; i < N; i++, average += 2) {
        ratio[i] = 1;
        last[i] = norm[i];
        all_done[i] = done[i];
        whole &= done[i];
        if (!done[i]) continue;
        average[0] += (1 - gamma) * (raw[i] - average[0]);
        average[1] += (1 - gamma) * (norm[i] - average[1]);
        float quotient = running ? average[0] / average[1] : raw[i] / norm[i];
        if (quotient > 0 && quotient < INFINITY) ratio[i] = quotient;
    }
    return whole;
}

#endif
