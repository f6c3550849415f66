"""The tuner, and the gate that compiles every configuration without a GPU.

Importing the package registers the tuner's results with the kernels.
"""

from __future__ import annotations

from gssf_triton.autotune import hook
from gssf_triton.kernels import choice

choice.register(hook.answer)
