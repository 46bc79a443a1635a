#define MEM1_ATTENTION attention_avx512
#include "cpu/attention_kernel.h"
