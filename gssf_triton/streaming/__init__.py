"""Everything that is computed from the M×N similarities without storing them.

`driver` walks S in chunks of constant size, as one `torch.library` operator. An epilogue (`epilogues`) says what is
kept of each chunk, and how what two chunks kept is merged. `triton` computes the same inside the similarity tile
(`gssf_triton.kernels.epilogues`).
"""
