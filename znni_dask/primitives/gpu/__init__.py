"""Primitives of a GPU: one file per algorithm, as of the CPU."""
