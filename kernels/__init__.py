"""Triton kernels of the layer; dispatch.py and experts.py launch them on plain tensors."""
