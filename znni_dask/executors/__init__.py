"""Executors: run a plan on one patch."""
