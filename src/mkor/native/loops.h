/* The loops of version.h as a version NAME: for processors with TARGET, of any kind if there is
   none, whose registers hold LANES floats. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "version.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

/* Of what follows only: headers of the system are for all processors. */
#ifdef TARGET
#ifdef __clang__
_Pragma(TEXT(clang attribute push(__attribute__((target(TARGET))), apply_to = function)))
#else
_Pragma(TEXT(GCC target(TARGET)))
#endif
#endif

#include "calls.h"
#include "gradients.h"
#include "windows.h"

const version JOINED(mkor_, NAME) = {
    .name = TEXT(NAME),
    .side_sums = side_sums,
    .add_call = add_call,
    .sum = sum,
    .joint_norms = joint_norms,
    .gather = gather,
    .scatter = scatter,
    .update_window = update_window,
    .roots = roots,
    .remove_rows = remove_rows,
    .remove_bias = remove_bias,
};

#if defined(TARGET) && defined(__clang__)
_Pragma("clang attribute pop")
#endif
