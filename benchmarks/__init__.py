"""Measurements of ilnas_kernels against PyTorch on this machine; nothing here asserts a time."""
