#define MEM1_ATTENTION attention_default
#include "cpu/attention_kernel.h"
