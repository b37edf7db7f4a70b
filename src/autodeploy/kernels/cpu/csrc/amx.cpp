// Whether products of bfloat16 use the processor's matrix unit.

#include "amx.h"

// 0: the kernels were compiled for a processor without one. 1: the operating system refuses its use. 2: they do.
extern "C" int matrix_unit() {
#if defined(AUTODEPLOY_AMX)
    return autodeploy::has_tiles ? 2 : 1;
#else
    return 0;
#endif
}
