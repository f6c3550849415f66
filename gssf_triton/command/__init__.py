"""`gssf-triton`: evaluate and search features on disk, without a line of Python.

`main` reads the arguments; `evaluate` and `search` are its commands; `files` reads what they are given, `results` and
`sheet` write what they found; `usage` is what a command that makes no sense gets.
"""

from gssf_triton.command.main import main

__all__ = ["main"]
