"""The options that choose the metric and the device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from gssf_triton.backend import CHOICES, resolve_backend
from gssf_triton.checks import check_weights
from gssf_triton.command.files import load_weights
from gssf_triton.command.usage import UsageError, default_device, parse_device, refusals
from gssf_triton.metric import Metric
from gssf_triton.retrieval.scoring import ARRAY_DTYPES
from gssf_triton.storage import native


class MetricOptions(NamedTuple):
    """Keyword arguments of the functions that the commands call, and the device of their tensors."""

    options: dict[str, Any]
    device: torch.device


def add_metric(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metric")
    weights = group.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path, metavar="NPZ", help="with W_diag (D,), W_blocks (G, B, B) or both")
    weights.add_argument("--cosine", action="store_true", help="plain cosine instead (with --raw: dot products)")
    group.add_argument("--raw", action="store_true", help="take the features as they are, not on the unit sphere")
    group.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument("--backend", choices=CHOICES, default="auto", help="default: %(default)s")


def load_metric(args: argparse.Namespace, features: NDArray[Any], transpose: bool = False) -> MetricOptions:
    """The metric for features of its left side, or, with `transpose`, of its right one."""
    device = parse_device(args.device)
    if args.cosine:
        metric = Metric(torch.ones(features.shape[1], dtype=ARRAY_DTYPES[features.dtype.newbyteorder("=")]))
    else:
        metric = load_weights("--weights", args.weights)
    metric = metric.map(lambda weight: weight.to(device))
    sample = as_tensor(features[:0], device)
    with refusals():
        check_weights("the features", sample, metric.W_diag, metric.W_blocks)
    metric = metric.mT if transpose else metric
    try:
        resolve_backend(args.backend, sample, metric.W_blocks)
    except (ValueError, RuntimeError) as fault:
        raise UsageError(f"--backend: {fault}") from None
    options = {**vars(metric), "normalize": not args.raw, "backend": args.backend}
    return MetricOptions(options, device)


def as_tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor; on the CPU it shares memory, unless the byte order must change."""
    return torch.from_numpy(native(array)).to(device)
