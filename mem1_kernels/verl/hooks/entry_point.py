"""What the entry point `verl.plugins` names. verl imports it, and calls nothing in it."""

from mem1_kernels.verl.plugin import load

load()
