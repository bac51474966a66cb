/* The loops for processors with AVX-512. */

#include "version.h"

#ifdef MKOR_X86
#define NAME avx512
#define TARGET "avx512f"
#define LANES 16
#include "loops.h"
#endif
