"""Devices that compute in memory of their own: a GPU, or one that is simulated."""
