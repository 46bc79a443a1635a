#define MEM1_CACHED_ATTENTION cached_attention_amx
#include "cpu/cached_attention_kernel.h"
