"""Batch normalization on a GPU, measured: see benchmarks/gpu.py."""
