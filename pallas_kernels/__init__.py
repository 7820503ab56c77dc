"""Fused kernels for the fast-weight update rules."""
