/* What is small and often in a step, on a CPU, in float32: each loop is one call instead of a dozen.

   Products of matrices stay with torch. Every function has a twin in torch operators, which serves
   all other devices and dtypes; tests/test_native.py compares the two. Arrays are dense and passed
   as addresses; mkor/native/__init__.py is their only caller and checks what it hands over. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__)
#error "written with the vector extensions of GCC and Clang"
#endif

/* One version for any processor of this kind, others for those that can do more. */
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define MANY __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define MANY
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

#define LOAD(p) (*(const vec *)(p))
#define STORE(p) (*(vec *)(p))
#define INLINE static inline __attribute__((always_inline))

INLINE float total(const vec *v) {
    const half *h = (const half *)v, sum = h[0] + h[1];
    const quarter *q = (const quarter *)&sum, four = q[0] + q[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

INLINE float dot(const float *x, const float *y, int64_t d) {
    vec sum = {0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) sum += LOAD(x + c) * LOAD(y + c);
    float all = total(&sum);
    for (; c < d; c++) all += x[c] * y[c];
    return all;
}

/* ------------------------------------------------------------------------------------ rows.py */

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
    float squares = 0;
    for (int64_t c = 0; c < d; c++) sum[c] += x[c], squares += x[c] * x[c];
    return squares;
}

/* Part j has size + (j < extra) samples of unit rows each, from offset + j stride + min(j, extra). */
typedef struct {
    Py_ssize_t k, size, stride, offset, extra, unit;
} parts;

INLINE int64_t rows_of(const parts *p, int64_t j) { return (p->size + (j < p->extra)) * p->unit; }

INLINE int64_t start_of(const parts *p, int64_t j) {
    return (p->offset + j * p->stride + (j < p->extra ? j : p->extra)) * p->unit;
}

/* sums[k, d] = the sum of each part's rows; returns that of the squares of all their entries. */
MANY static double row_sums(const float *x, int64_t d, const parts *p, float *sums) {
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

/* ----------------------------------------------------------------------------- convolution.py */

/* Images [channels, height, width], a kernel's taps, its steps, the distance of its taps and the
   padding before, all by axis; and some lines of the output, which has `across` columns. */
typedef struct {
    Py_ssize_t channels, height, width, taps[2], stride[2], dilation[2], before[2];
    Py_ssize_t first, lines, across;
} images;

/* line[width] += those lines of a channel that lie under tap t of the chosen output lines, and
   squares[width] += their squares. */
INLINE void add_lines(const float *x, const images *im, Py_ssize_t t, float *restrict line,
                      float *restrict squares) {
    for (Py_ssize_t out = im->first; out < im->first + im->lines; out++) {
        Py_ssize_t y = out * im->stride[0] + t * im->dilation[0] - im->before[0];
        if (y < 0 || y >= im->height) continue;
        const float *restrict row = x + y * im->width;
        for (Py_ssize_t c = 0; c < im->width; c++) line[c] += row[c], squares[c] += row[c] * row[c];
    }
}

/* The sum of a line's entries under tap t, outside of which there are zeros; all is that of all. */
INLINE float under_tap(const float *line, float all, const images *im, Py_ssize_t t) {
    Py_ssize_t step = im->stride[1], start = t * im->dilation[1] - im->before[1];
    Py_ssize_t end = start + im->across * step;
    if (step == 1) {
        for (Py_ssize_t c = 0; c < start && c < im->width; c++) all -= line[c];
        for (Py_ssize_t c = end < 0 ? 0 : end; c < im->width; c++) all -= line[c];
        return start < im->width && end > 0 ? all : 0;
    }
    float sum = 0;
    for (Py_ssize_t c = start; c < end; c += step)
        if (c >= 0 && c < im->width) sum += line[c];
    return sum;
}

INLINE float all_of(const float *line, Py_ssize_t wide) {
    vec sum = {0};
    for (Py_ssize_t c = 0; c < wide; c += LANES) sum += LOAD(line + c);
    return total(&sum);
}

/* sums[k, channels * taps] = summed patches of each part's images; returns that of all squares.
   line[2 wide] is for work, where wide is the width made a multiple of LANES. */
MANY static double patch_sums(const float *x, const images *im, const parts *p, Py_ssize_t wide,
                              float *line, float *sums) {
    Py_ssize_t area = im->height * im->width, taps = im->taps[0] * im->taps[1];
    double squares = 0;
    for (int64_t j = 0; j < p->k; j++) {
        const float *part = x + start_of(p, j) * im->channels * area;
        for (Py_ssize_t c = 0; c < im->channels; c++)
            for (Py_ssize_t t = 0; t < im->taps[0]; t++) {
                memset(line, 0, 2 * wide * sizeof(float));
                for (int64_t image = 0; image < rows_of(p, j); image++)
                    add_lines(part + (image * im->channels + c) * area, im, t, line, line + wide);
                float all = all_of(line, wide), all_squares = all_of(line + wide, wide);
                float *out = sums + (j * im->channels + c) * taps + t * im->taps[1];
                for (Py_ssize_t u = 0; u < im->taps[1]; u++) {
                    out[u] = under_tap(line, all, im, u);
                    squares += under_tap(line + wide, all_squares, im, u);
                }
            }
    }
    return squares;
}

/* sums[k, channels] = each part's images summed over the chosen lines, as wide as they are. */
MANY static double line_sums(const float *g, const images *im, const parts *p, float *sums) {
    Py_ssize_t area = im->height * im->width, n = im->lines * im->width;
    double squares = 0;
    for (int64_t j = 0; j < p->k; j++)
        for (Py_ssize_t c = 0; c < im->channels; c++) {
            double sum = 0;
            for (int64_t image = start_of(p, j); image < start_of(p, j) + rows_of(p, j); image++) {
                const float *x = g + (image * im->channels + c) * area + im->first * im->width;
                vec s = {0}, q = {0};
                Py_ssize_t i = 0;
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

/* ------------------------------------------------------------------------ curvature/window.py */

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

MANY static void write_ring(const float *vectors, const int64_t *slots, const int64_t *places,
                            int64_t n, int64_t r, int64_t d, float *ring, float *gram) {
    for (int64_t j = 0; j < n; j++)
        memcpy(ring + places[j] * d, vectors + slots[j] * d, d * sizeof(float));
    for (int64_t j = 0; j < n; j += 4)
        four_products(ring, r, d, places + j, n - j < 4 ? n - j : 4, gram);
}

/* ---------------------------------------------------------------------- linalg/windows.py */

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
MANY static int root(const float *gram, const float *weights, float lambda, float one, int64_t r,
                     float *s, float *T, float *X, float *A) {
    int64_t wide = PADDED(r);
    for (int64_t i = 0; i < r; i++) s[i] = lambda > 0 ? sqrtf(weights[i] / lambda) : 0;
    memset(T, 0, r * wide * sizeof(float));
    memset(X, 0, r * wide * sizeof(float));
    for (int64_t i = 0; i < r; i++) {
        /* Whole blocks, though a row of T begins at its diagonal: what comes before is never read. */
        float *t = T + i * wide, *x = X + i * wide;
        int64_t begin = i / BLOCK * BLOCK;
        for (int64_t c = begin; c < r; c++) t[c] = s[i] * (gram[i * r + c] + one) * s[c];
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
        for (int64_t c = 0; c < r; c++) A[i * r + c] = c <= i ? X[i * wide + c] * s[c] : 0;
    return 1;
}

/* b[d] -= U^T (U b) for U [r, d]. */
MANY static void remove_rows(const float *U, int64_t r, int64_t d, float *x, float *b) {
    for (int64_t i = 0; i < r; i++) x[i] = dot(U + i * d, b, d);
    for (int64_t i = 0; i < r; i++)
        for (int64_t c = 0; c < d; c++) b[c] -= x[i] * U[i * d + c];
}

/* Y[d, r] += b u^T, then b[d] -= Y u. */
MANY static void remove_bias(const float *u, int64_t r, int64_t d, float *Y, float *b) {
    for (int64_t i = 0; i < d; i++) {
        float *restrict y = Y + i * r, entry = b[i];
        for (int64_t c = 0; c < r; c++) y[c] += entry * u[c];
        b[i] -= dot(y, u, r);
    }
}

/* --------------------------------------------------------------------------------- to Python */

static PyObject *py_row_sums(PyObject *self, PyObject *args) {
    unsigned long long x, sums, square;
    Py_ssize_t d;
    parts p;
    if (!PyArg_ParseTuple(args, "KnnnnnnnKK", &x, &d, &p.k, &p.size, &p.stride, &p.offset, &p.extra,
                          &p.unit, &sums, &square))
        return NULL;
    *(float *)square = (float)row_sums((const float *)x, d, &p, (float *)sums);
    Py_RETURN_NONE;
}

/* Adds both sides of a call to their places, and its numbers of rows; into = 0 leaves a side out.
   kept[k d_in + 1] is filled with the sums of inputs and of their squares; 0 if nobody needs it. */
static PyObject *py_add_call(PyObject *self, PyObject *args) {
    unsigned long long x[2], into[2], meta_, kept;
    Py_ssize_t d[2], total;
    parts p;
    if (!PyArg_ParseTuple(args, "KKnnnnnnnnnKKKK", &x[0], &x[1], &d[0], &d[1], &p.k, &p.size,
                          &p.stride, &p.offset, &p.extra, &p.unit, &total, &into[0], &into[1],
                          &meta_, &kept))
        return NULL;
    float *meta = (float *)meta_;
    float *work = malloc(p.k * (d[0] > d[1] ? d[0] : d[1]) * sizeof(float));
    if (!work) return PyErr_NoMemory();
    for (int side = 0; side < 2; side++) {
        if (!into[side]) continue;
        float *sums = side || !kept ? work : (float *)kept, *place = (float *)into[side];
        int64_t n = p.k * d[side];
        float square = (float)row_sums((const float *)x[side], d[side], &p, sums);
        for (int64_t i = 0; i < n; i++) place[i] += sums[i];
        meta[side] += square;
        if (sums != work) sums[n] = square;
    }
    meta[2] += total;
    for (int64_t j = 0; j < p.k; j++) meta[3 + j] += rows_of(&p, j);
    free(work);
    Py_RETURN_NONE;
}

/* Summed patches, see patch_sums. */
static PyObject *py_patch_sums(PyObject *self, PyObject *args) {
    unsigned long long x, sums, square;
    images im;
    parts p;
    if (!PyArg_ParseTuple(args, "K(nnn)(nn)(nn)(nn)(nn)(nnn)(nnnnnn)KK", &x, &im.channels,
                          &im.height, &im.width, &im.taps[0], &im.taps[1], &im.stride[0],
                          &im.stride[1], &im.dilation[0], &im.dilation[1], &im.before[0],
                          &im.before[1], &im.first, &im.lines, &im.across, &p.k, &p.size, &p.stride,
                          &p.offset, &p.extra, &p.unit, &sums, &square))
        return NULL;
    Py_ssize_t wide = (im.width + LANES - 1) / LANES * LANES;
    float *line = malloc(2 * wide * sizeof(float));
    if (!line) return PyErr_NoMemory();
    *(float *)square = (float)patch_sums((const float *)x, &im, &p, wide, line, (float *)sums);
    free(line);
    Py_RETURN_NONE;
}

/* Summed output gradients, see line_sums. */
static PyObject *py_line_sums(PyObject *self, PyObject *args) {
    unsigned long long g, sums, square;
    images im;
    parts p;
    if (!PyArg_ParseTuple(args, "K(nnn)(nn)(nnnnnn)KK", &g, &im.channels, &im.height, &im.width,
                          &im.first, &im.lines, &p.k, &p.size, &p.stride, &p.offset, &p.extra,
                          &p.unit, &sums, &square))
        return NULL;
    *(float *)square = (float)line_sums((const float *)g, &im, &p, (float *)sums);
    Py_RETURN_NONE;
}

/* Which layers had data, whose squares and gradients are finite, and whether any layer's are not. */
static PyObject *py_check(PyObject *self, PyObject *args) {
    Py_ssize_t N, k;
    unsigned long long meta_, norms, seen, finite, bad;
    if (!PyArg_ParseTuple(args, "nnKKKKK", &N, &k, &meta_, &norms, &seen, &finite, &bad))
        return NULL;
    int all = 1;
    for (Py_ssize_t i = 0; i < N; i++) {
        const float *meta = (const float *)meta_ + i * (3 + k);
        int good = meta[0] + meta[1] + ((const float *)norms)[i] < INFINITY;
        ((uint8_t *)seen)[i] = meta[2] > 0;
        ((uint8_t *)finite)[i] = good;
        all &= good;
    }
    *(uint8_t *)bad = !all;
    Py_RETURN_NONE;
}

/* See mkor.roster.Roster.count; numbers [4 + 2k, N]: used rows, scale of raw g, mean squares of both
   sides, then rows and scales of each vector by layer. Returns whether all layers accept all. */
static PyObject *py_count(PyObject *self, PyObject *args) {
    Py_ssize_t N, k;
    double factor;
    unsigned long long refuse_, meta_, widths_, seen, numbers_, filled_, accept;
    if (!PyArg_ParseTuple(args, "nndKKKKKKK", &N, &k, &factor, &refuse_, &meta_, &widths_, &seen,
                          &numbers_, &filled_, &accept))
        return NULL;
    int refuse = *(const uint8_t *)refuse_;
    const float *d_out = (const float *)widths_, *d_in = d_out + N, *ones = d_in + N;
    float *used = (float *)numbers_, *scale = used + N, *left = scale + N, *right = left + N;
    float *rows = right + N, *means = rows + N * k;
    uint8_t *filled = (uint8_t *)filled_;
    int whole = 1;
    for (Py_ssize_t i = 0; i < N; i++) {
        const float *meta = (const float *)meta_ + i * (3 + k), *counts = meta + 3;
        float n = 0;
        scale[i] = meta[2] * (float)factor;
        for (Py_ssize_t j = 0; j < k; j++) {
            n += counts[j];
            rows[i * k + j] = counts[j] < 1 ? 1 : counts[j];
            means[i * k + j] = scale[i] / rows[i * k + j];
            filled[i * k + j] = counts[j] > 0;
            whole &= filled[i * k + j];
        }
        used[i] = n < 1 ? 1 : n;
        left[i] = meta[1] * (scale[i] * scale[i]) / (used[i] * d_out[i]);
        right[i] = (meta[0] + used[i] * ones[i]) / (used[i] * d_in[i]);
        ((uint8_t *)accept)[i] = ((const uint8_t *)seen)[i] && !refuse;
        whole &= ((uint8_t *)accept)[i];
    }
    return PyBool_FromLong(whole);
}

/* Running norms move, and what preconditioned gradients are multiplied with follows from them, or
   from the norms themselves; see mkor.application. */
static PyObject *py_ratio(PyObject *self, PyObject *args) {
    Py_ssize_t N;
    int running;
    double gamma;
    unsigned long long average_, raw_, norm_, done_, ratio_;
    if (!PyArg_ParseTuple(args, "npdKKKKK", &N, &running, &gamma, &average_, &raw_, &norm_, &done_,
                          &ratio_))
        return NULL;
    const float *raw = (const float *)raw_, *norm = (const float *)norm_;
    for (Py_ssize_t i = 0; i < N; i++) {
        float *average = (float *)average_ + 2 * i, *ratio = (float *)ratio_ + i;
        *ratio = 1;
        if (!((const uint8_t *)done_)[i]) continue;
        average[0] += (float)(1 - gamma) * (raw[i] - average[0]);
        average[1] += (float)(1 - gamma) * (norm[i] - average[1]);
        float quotient = running ? average[0] / average[1] : raw[i] / norm[i];
        if (quotient > 0 && quotient < INFINITY) *ratio = quotient;
    }
    Py_RETURN_NONE;
}

/* Ages each layer's window and writes its new vectors; layers that do not accept stay as they are. */
static PyObject *py_window_update(PyObject *self, PyObject *args) {
    Py_ssize_t B, k, r;
    double gamma;
    unsigned long long filled_, accept_, updates_, written_, weights_;
    PyObject *sides;
    if (!PyArg_ParseTuple(args, "nnndKKKKKO", &B, &k, &r, &gamma, &filled_, &accept_, &updates_,
                          &written_, &weights_, &sides))
        return NULL;
    const uint8_t *filled = (const uint8_t *)filled_, *accept = (const uint8_t *)accept_;
    int64_t *updates = (int64_t *)updates_, *written = (int64_t *)written_;
    float *weights = (float *)weights_;
    int64_t *slots = malloc(2 * k * sizeof(int64_t)), *places = slots + k;
    if (!slots) return PyErr_NoMemory();
    float *vectors[2], *squares[2], *ring[2], *gram[2], *averages[2];
    Py_ssize_t d[2], count = PyTuple_Size(sides);
    for (Py_ssize_t side = 0; side < count; side++) {
        unsigned long long p[5];
        if (!PyArg_ParseTuple(PyTuple_GetItem(sides, side), "nKKKKK", &d[side], &p[0], &p[1], &p[2],
                              &p[3], &p[4])) {
            free(slots);
            return NULL;
        }
        vectors[side] = (float *)p[0], squares[side] = (float *)p[1], ring[side] = (float *)p[2];
        gram[side] = (float *)p[3], averages[side] = (float *)p[4];
    }
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
        for (int64_t j = 0; j < made; j++) w[places[j]] = (float)(1 - gamma) / made;
        for (Py_ssize_t side = 0; side < count; side++) {
            write_ring(vectors[side] + b * k * d[side], slots, places, made, r, d[side],
                       ring[side] + b * r * d[side], gram[side] + b * r * r);
            averages[side][b] += (float)(1 - gamma) * (squares[side][b] - averages[side][b]);
        }
        written[b] += made;
        updates[b]++;
    }
    free(slots);
    Py_RETURN_NONE;
}

static PyObject *py_roots(PyObject *self, PyObject *args) {
    Py_ssize_t B, r;
    double damping, one;
    unsigned long long gram, weights, squares, A;
    if (!PyArg_ParseTuple(args, "nnddKKKK", &B, &r, &damping, &one, &gram, &weights, &squares, &A))
        return NULL;
    int64_t wide = PADDED(r);
    float *work = malloc((2 * r * wide + r) * sizeof(float));
    if (!work) return PyErr_NoMemory();
    for (int64_t b = 0; b < B; b++) {
        float *out = (float *)A + b * r * r;
        int good = root((const float *)gram + b * r * r, (const float *)weights + b * r,
                        (float)damping * ((const float *)squares)[b], (float)one, r,
                        work + 2 * r * wide, work, work + r * wide, out);
        for (int64_t i = 0; !good && i < r * r; i++) out[i] = NAN;
    }
    free(work);
    Py_RETURN_NONE;
}

static PyObject *py_remove_rows(PyObject *self, PyObject *args) {
    Py_ssize_t B, r, d;
    unsigned long long U, b;
    if (!PyArg_ParseTuple(args, "nnnKK", &B, &r, &d, &U, &b)) return NULL;
    float *x = malloc(r * sizeof(float));
    if (!x) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < B; i++)
        remove_rows((const float *)U + i * r * d, r, d, x, (float *)b + i * d);
    free(x);
    Py_RETURN_NONE;
}

static PyObject *py_remove_bias(PyObject *self, PyObject *args) {
    Py_ssize_t B, r, d;
    unsigned long long u, Y, b;
    if (!PyArg_ParseTuple(args, "nnnKKK", &B, &r, &d, &u, &Y, &b)) return NULL;
    for (Py_ssize_t i = 0; i < B; i++)
        remove_bias((const float *)u + i * r, r, d, (float *)Y + i * d * r, (float *)b + i * d);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"row_sums", py_row_sums, METH_VARARGS, "Sums of the rows of each part, and of all squares."},
    {"add_call", py_add_call, METH_VARARGS, "Add the sums of a call's inputs and gradients."},
    {"patch_sums", py_patch_sums, METH_VARARGS, "Summed patches of each part's images."},
    {"line_sums", py_line_sums, METH_VARARGS, "Output gradients summed over lines of images."},
    {"check", py_check, METH_VARARGS, "Which layers had data that is finite."},
    {"count", py_count, METH_VARARGS, "What follows from counts and squares."},
    {"ratio", py_ratio, METH_VARARGS, "What preconditioned gradients are multiplied with."},
    {"window_update", py_window_update, METH_VARARGS, "Age windows and write new vectors."},
    {"remove_rows", py_remove_rows, METH_VARARGS, "b - U^T U b."},
    {"remove_bias", py_remove_bias, METH_VARARGS, "A bias's part in Y, and what Y takes off it."},
    {"roots", py_roots, METH_VARARGS, "K^-1 diag(s) of each layer."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
