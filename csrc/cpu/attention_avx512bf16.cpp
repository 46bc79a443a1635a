#define MEM1_ATTENTION attention_avx512bf16
#include "cpu/attention_kernel.h"
