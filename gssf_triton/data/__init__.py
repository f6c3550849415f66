"""Data sets for the examples: `gssf_triton.data.glyphs`. Needs the extra `gssf_triton[data]`."""
