#define MEM1_ATTENTION attention_avx2
#include "cpu/attention_kernel.h"
