#define MEM1_ATTENTION attention_amx
#include "cpu/attention_amx_kernel.h"
