"""Modules that are one node in graphs traced by torch.fx (`symbolic_trace`, feature extractors), as torch.nn's are.

The public functions are one node each, by `torch.fx.wrap`. If a module is itself the root of a trace, its graph is made
of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.fx
from torch import nn


class Leaf(nn.Module):
    """A module that torch.fx does not trace into, so that its hooks, dropout and training mode still work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            tracer = _tracer_of(x)
            if tracer is not None:
                return tracer.call_module(self, partial(_step, tracer, self), args, kwargs)
        return super().__call__(*args, **kwargs)


def _tracer_of(x: Any) -> Any:
    """The tracer of a proxy, or of one inside a list, tuple or dict."""
    if isinstance(x, torch.fx.Proxy):
        return x.tracer
    if isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            tracer = _tracer_of(part)
            if tracer is not None:
                return tracer
    return None


def _step(tracer: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
