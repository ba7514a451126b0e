"""Kernels in CUDA C++, each beside the same in numpy."""
