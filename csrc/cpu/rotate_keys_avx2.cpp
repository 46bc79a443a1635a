#define MEM1_ROTATE_KEYS rotate_keys_avx2
#include "cpu/rotate_keys_kernel.h"
