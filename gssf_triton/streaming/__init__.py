"""Everything that is computed from the M×N similarities without storing them.

`driver` walks S in chunks of constant size; an `Epilogue` (`epilogues`) says what is kept of each chunk, and how what
two chunks kept is merged; `op` makes one `torch.library` operator of it. The Triton backend runs the same epilogues
inside its similarity tile (`gssf_triton.kernels.epilogues`).
"""
