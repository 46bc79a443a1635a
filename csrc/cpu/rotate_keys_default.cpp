#define MEM1_ROTATE_KEYS rotate_keys_default
#include "cpu/rotate_keys_kernel.h"
