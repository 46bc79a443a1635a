#define MEM1_CACHED_ATTENTION cached_attention_avx2
#include "cpu/cached_attention_kernel.h"
