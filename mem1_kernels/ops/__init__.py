"""Tensor ops. Each is a torch operator `mem1::…` with a CPU and a CUDA implementation."""
