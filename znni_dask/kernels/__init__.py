"""Compiled inner loops that the CPU primitives share, and the threads that run them."""
