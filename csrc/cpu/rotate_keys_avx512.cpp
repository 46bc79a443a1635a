#define MEM1_ROTATE_KEYS rotate_keys_avx512
#include "cpu/rotate_keys_kernel.h"
