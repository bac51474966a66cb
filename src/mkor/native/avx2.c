/* The loops for processors with AVX2 and FMA. */

#include "version.h"

#ifdef MKOR_X86
#define NAME avx2
#define TARGET "avx2,fma"
#define LANES 8
#include "loops.h"
#endif
