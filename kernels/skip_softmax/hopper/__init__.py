"""Kernels for Hopper (sm_90), in Triton's Gluon."""
