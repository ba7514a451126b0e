"""Volumes and outputs on disk."""
