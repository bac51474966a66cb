/* The loops for any processor; the registers of today's hold four floats at least. */

#define NAME plain
#define LANES 4
#include "loops.h"
