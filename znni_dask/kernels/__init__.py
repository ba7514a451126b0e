"""Compiled inner loops that the CPU primitives share."""
