"""Triton kernels and their launchers.

`tile` holds what every kernel shares: the similarity tile (load, fold, product). Each other file is one kernel, which
differs from the next in its epilogue, with the launcher that calls it. Importing this package does not import Triton;
importing any module in it does.
"""
