#define MEM1_CACHED_ATTENTION cached_attention_avx512
#include "cpu/cached_attention_kernel.h"
