"""The similarity: public functions, and what computes them with Triton's kernels or in plain torch."""
