/* Loops over many numbers, which are compiled once for each kind of processor. */

#ifndef MKOR_VERSION_H
#define MKOR_VERSION_H

#include "types.h"

typedef struct {
    const char *name;
    double (*side_sums)(const plan *s, int side, const float *x, float *sums);
    int (*add_call)(const plan *s, const float *const x[2], float *const into[2], float *meta);
    float (*sum)(const float *x, int64_t n);
    void (*joint_norms)(const stack *s, float *norm);
    void (*gather)(const stack *s, float *norm);
    void (*scatter)(const stack *s, const float *ratio);
    int (*update_window)(int64_t B, int64_t k, int64_t r, double gamma, const uint8_t *filled,
                         const uint8_t *accept, int64_t *updates, int64_t *written, float *weights,
                         const side *sides, int count);
    int (*roots)(int64_t B, int64_t r, const float *gram, const float *weights, float damping,
                 const float *squares, float one, float *A);
    int (*remove_rows)(int64_t B, int64_t r, int64_t d, const float *U, float *b);
    void (*remove_bias)(int64_t B, int64_t r, int64_t d, const float *u, float *Y, float *b);
} version;

extern const version mkor_plain;
#if defined(__x86_64__)
#define MKOR_X86
extern const version mkor_avx2, mkor_avx512;
#endif

#endif
