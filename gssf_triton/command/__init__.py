"""`gssf-triton`: evaluate and search features on disk, without a line of Python.

`main` parses the arguments; `evaluate` and `search` are the commands; `files` reads their inputs, `results` and `sheet`
write their outputs; `usage` holds what command lines share.
"""

from gssf_triton.command.main import main

__all__ = ["main"]
