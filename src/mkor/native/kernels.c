/* What is small and often in a step, on a CPU, in float32: each loop is one call instead of a dozen.

   Products of matrices stay with torch. Every function has a twin in torch operators, which serves
   all other devices and dtypes; tests/test_native.py compares the two. Arrays are dense and passed
   as addresses; the Python files beside this one are their only callers and know their sizes.

   This file is what Python sees. loops.h and what it includes are the loops over many numbers; they
   are compiled once for each kind of processor, by avx512.c, avx2.c and plain.c. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"
#include "version.h"

typedef unsigned long long address;

static const version *const versions[] = {
#ifdef MKOR_X86
    &mkor_avx512,
    &mkor_avx2,
#endif
    &mkor_plain,
};
#define VERSIONS ((int)(sizeof versions / sizeof *versions))

/* The one that runs: unless told otherwise, the first that this processor can. */
static const version *run;

static int can_run(const version *v) {
#ifdef MKOR_X86
    if (v == &mkor_avx512) return __builtin_cpu_supports("avx512f");
    if (v == &mkor_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return 1;
}

static PyObject *none_if(int good) {
    if (!good) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_versions(PyObject *self, PyObject *args) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < VERSIONS; i++) {
        if (!can_run(versions[i])) continue;
        PyObject *name = PyUnicode_FromString(versions[i]->name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_version(PyObject *self, PyObject *args) {
    return PyUnicode_FromString(run->name);
}

static PyObject *py_use(PyObject *self, PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    for (int i = 0; i < VERSIONS; i++)
        if (can_run(versions[i]) && !strcmp(versions[i]->name, name)) {
            run = versions[i];
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this processor has no version '%s'", name);
}

static PyObject *py_side_sums(PyObject *self, PyObject *args) {
    address s, x, sums, square;
    int side;
    if (!PyArg_ParseTuple(args, "KiKKK", &s, &side, &x, &sums, &square)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    *(float *)square = (float)run->side_sums((const plan *)s, side, (const float *)x, (float *)sums);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_add_call(PyObject *self, PyObject *args) {
    address s, x, g, a_place, g_place, meta;
    if (!PyArg_ParseTuple(args, "KKKKKK", &s, &x, &g, &a_place, &g_place, &meta)) return NULL;
    const float *const both[2] = {(const float *)x, (const float *)g};
    float *const into[2] = {(float *)a_place, (float *)g_place};
    return none_if(run->add_call((const plan *)s, both, into, (float *)meta));
}

static PyObject *py_check(PyObject *self, PyObject *args) {
    long long N, width;
    address meta, norms, seen, finite, bad;
    if (!PyArg_ParseTuple(args, "LLKKKKK", &N, &width, &meta, &norms, &seen, &finite, &bad)) return NULL;
    check_layers(N, width, (const float *)meta, (const float *)norms, (uint8_t *)seen,
                 (uint8_t *)finite, (uint8_t *)bad);
    Py_RETURN_NONE;
}

static PyObject *py_count(PyObject *self, PyObject *args) {
    long long N, k;
    double factor;
    address refuse, meta, widths, seen, numbers, filled, accept, fed;
    if (!PyArg_ParseTuple(args, "LLdKKKKKKKK", &N, &k, &factor, &refuse, &meta, &widths, &seen,
                          &numbers, &filled, &accept, &fed))
        return NULL;
    return PyBool_FromLong(count_layers(
        N, k, (float)factor, *(const uint8_t *)refuse, (const float *)meta, (const float *)widths,
        (const uint8_t *)seen, (float *)numbers, (uint8_t *)filled, (uint8_t *)accept,
        (uint8_t *)fed));
}

static PyObject *py_usable(PyObject *self, PyObject *args) {
    long long N;
    int due;
    address updates, seen, finite, norms, use, ok;
    if (!PyArg_ParseTuple(args, "LpKKKKKK", &N, &due, &updates, &seen, &finite, &norms, &use, &ok))
        return NULL;
    usable_layers(N, due, (const int64_t *)updates, (const uint8_t *)seen, (const uint8_t *)finite,
                  (const float *)norms, (uint8_t *)use, (uint8_t *)ok);
    Py_RETURN_NONE;
}

static PyObject *py_ratio(PyObject *self, PyObject *args) {
    long long N;
    int running;
    double gamma;
    address average, raw, norm, done, last, all_done, ratio;
    if (!PyArg_ParseTuple(args, "LpdKKKKKKK", &N, &running, &gamma, &average, &raw, &norm, &done,
                          &last, &all_done, &ratio))
        return NULL;
    return PyBool_FromLong(norm_ratios(
        N, running, (float)gamma, (float *)average, (const float *)raw, (const float *)norm,
        (const uint8_t *)done, (float *)last, (uint8_t *)all_done, (float *)ratio));
}

static int read_side(PyObject *tuple, side *s) {
    address sums, scale, square, ring, gram, average;
    long long d;
    if (!tuple || !PyArg_ParseTuple(tuple, "LKKKKKK", &d, &sums, &scale, &square, &ring, &gram,
                                    &average))
        return 0;
    *s = (side){d, (const float *)sums, (const float *)scale, (const float *)square,
                (float *)ring, (float *)gram, (float *)average};
    return 1;
}

static PyObject *py_window_update(PyObject *self, PyObject *args) {
    long long B, k, r;
    double gamma;
    address filled, accept, updates, written, weights;
    PyObject *tuple;
    if (!PyArg_ParseTuple(args, "LLLdKKKKKO!", &B, &k, &r, &gamma, &filled, &accept, &updates,
                          &written, &weights, &PyTuple_Type, &tuple))
        return NULL;
    side sides[2];
    int count = (int)PyTuple_Size(tuple);
    for (int i = 0; i < count; i++)
        if (!read_side(PyTuple_GetItem(tuple, i), &sides[i])) return NULL;
    int good = run->update_window(B, k, r, gamma, (const uint8_t *)filled, (const uint8_t *)accept,
                                  (int64_t *)updates, (int64_t *)written, (float *)weights, sides,
                                  count);
    return none_if(good);
}

static PyObject *py_roots(PyObject *self, PyObject *args) {
    long long B, r;
    double damping, one;
    address gram, weights, squares, A;
    if (!PyArg_ParseTuple(args, "LLddKKKK", &B, &r, &damping, &one, &gram, &weights, &squares, &A))
        return NULL;
    return none_if(run->roots(B, r, (const float *)gram, (const float *)weights, (float)damping,
                              (const float *)squares, (float)one, (float *)A));
}

static PyObject *py_remove_rows(PyObject *self, PyObject *args) {
    long long B, r, d;
    address U, b;
    if (!PyArg_ParseTuple(args, "LLLKK", &B, &r, &d, &U, &b)) return NULL;
    return none_if(run->remove_rows(B, r, d, (const float *)U, (float *)b));
}

static PyObject *py_remove_bias(PyObject *self, PyObject *args) {
    long long B, r, d;
    address u, Y, b;
    if (!PyArg_ParseTuple(args, "LLLKKK", &B, &r, &d, &u, &Y, &b)) return NULL;
    run->remove_bias(B, r, d, (const float *)u, (float *)Y, (float *)b);
    Py_RETURN_NONE;
}

/* The homes of a stack's gradients, from a tuple of addresses; NULL with an error set. */
static float **read_homes(PyObject *tuple) {
    Py_ssize_t count = PyTuple_Size(tuple);
    float **home = malloc((count + 1) * sizeof(float *));
    if (!home) return (float **)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++)
        home[i] = (float *)PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, i));
    return home;
}

static PyObject *py_gather(PyObject *self, PyObject *args) {
    stack s;
    address W, b, norm;
    PyObject *homes;
    if (!PyArg_ParseTuple(args, "LLLKKO!K", &s.B, &s.n, &s.m, &W, &b, &PyTuple_Type, &homes, &norm))
        return NULL;
    s.W = (float *)W, s.b = (float *)b;
    if (!(s.home = read_homes(homes))) return NULL;
    run->gather(&s, (float *)norm);
    free(s.home);
    Py_RETURN_NONE;
}

static PyObject *py_scatter(PyObject *self, PyObject *args) {
    stack s;
    address W, b, ratio;
    PyObject *homes;
    if (!PyArg_ParseTuple(args, "LLLKKO!K", &s.B, &s.n, &s.m, &W, &b, &PyTuple_Type, &homes, &ratio))
        return NULL;
    s.W = (float *)W, s.b = (float *)b;
    if (!(s.home = read_homes(homes))) return NULL;
    run->scatter(&s, (const float *)ratio);
    free(s.home);
    Py_RETURN_NONE;
}

static PyObject *py_joint_norms(PyObject *self, PyObject *args) {
    PyObject *stacks;
    address norm;
    if (!PyArg_ParseTuple(args, "O!K", &PyTuple_Type, &stacks, &norm)) return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_Size(stacks); i++) {
        stack s = {0};
        address W, b;
        if (!PyArg_ParseTuple(PyTuple_GetItem(stacks, i), "LLLKK", &s.B, &s.n, &s.m, &W, &b))
            return NULL;
        s.W = (float *)W, s.b = (float *)b;
        run->joint_norms(&s, (float *)norm);
        norm += s.B * sizeof(float);
    }
    Py_RETURN_NONE;
}

static PyObject *py_finite(PyObject *self, PyObject *args) {
    address x;
    long long n;
    if (!PyArg_ParseTuple(args, "KL", &x, &n)) return NULL;
    return PyBool_FromLong(isfinite(run->sum((const float *)x, n)));
}

static PyMethodDef methods[] = {
    {"versions", py_versions, METH_NOARGS, "Names of what this processor can run, best first."},
    {"version", py_version, METH_NOARGS, "The one that runs."},
    {"use", py_use, METH_VARARGS, "Run another."},
    {"side_sums", py_side_sums, METH_VARARGS, "Sums of the parts of a side, and of all squares."},
    {"add_call", py_add_call, METH_VARARGS, "Add the sums of a call's inputs and gradients."},
    {"gather", py_gather, METH_VARARGS, "Small gradients side by side."},
    {"scatter", py_scatter, METH_VARARGS, "The same times a ratio, back to where they were."},
    {"joint_norms", py_joint_norms, METH_VARARGS, "Norms of weights and biases together."},
    {"check", py_check, METH_VARARGS, "Which layers had data that is finite."},
    {"count", py_count, METH_VARARGS, "What follows from counts and squares."},
    {"usable", py_usable, METH_VARARGS, "Which layers and gradients are preconditioned."},
    {"ratio", py_ratio, METH_VARARGS, "What preconditioned gradients are multiplied with."},
    {"window_update", py_window_update, METH_VARARGS, "Age windows and write new vectors."},
    {"finite", py_finite, METH_VARARGS, "Whether a sum is."},
    {"remove_rows", py_remove_rows, METH_VARARGS, "b - U^T U b."},
    {"remove_bias", py_remove_bias, METH_VARARGS, "A bias's part in Y, and what Y takes off it."},
    {"roots", py_roots, METH_VARARGS, "K^-1 diag(s) of each layer."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods};

PyMODINIT_FUNC PyInit__kernels(void) {
    for (int i = 0; !run; i++)
        if (can_run(versions[i])) run = versions[i];
    return PyModule_Create(&module);
}
