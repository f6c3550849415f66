"""Which configuration a launch takes: the one place where that is decided.

The override in force (`use`) comes first, then what the registered finder has measured (`register`), then the model's
choice, a pure function of shape, dtype and architecture. Answers are remembered by exact shape, so that a repeated call
costs one look into a dictionary. Triton is not imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple, overload

import torch

from gssf_triton.kernels import configs, devices
from gssf_triton.kernels.configs import (
    ChunkConfig,
    CrossAttentionConfig,
    FoldConfig,
    GradientConfig,
    LateInteractionConfig,
    PairwiseConfig,
)
from gssf_triton.kernels.plans import PLANS, PlanChoice, as_compiled, modelled_plan
from gssf_triton.kernels.release import TRITON_RELEASE
from gssf_triton.kernels.retrieval_configs import RetrievalConfig, retrieval_config

Config = (
    PairwiseConfig
    | FoldConfig
    | GradientConfig
    | ChunkConfig
    | PlanChoice
    | RetrievalConfig
    | LateInteractionConfig
    | CrossAttentionConfig
)

#: Run by torch, on any device; the other kernels are Triton's.
TORCH_KERNELS = ("chunk",)
#: Answers remembered before all are forgotten: bounds the memory of a program in which every batch has another size.
MOST_REMEMBERED = 16_384


class Call(NamedTuple):
    """A kernel to launch.

    Attributes:
        kernel: Its name.
        where: Where the features are.
        dtype: Their dtype.
        tf32: Whether float32 products may round to TF32.
        M: Rows of S, or of the one side that the kernel takes; the regions of an image.
        N: Columns of S, 0 without; the words of a caption.
        D: Channels.
        B: Block size, 0 without blocks.
        batch: Matrices S.
    """

    kernel: str
    where: torch.device
    dtype: torch.dtype
    tf32: bool
    M: int
    N: int
    D: int
    B: int = 0
    batch: int = 1


#: Call → (configuration or None for the model's, whether the answer may be remembered).
Finder = Callable[[Call], tuple[Config | None, bool]]

_find: Finder = lambda call: (None, True)  # noqa: E731
_remembered: dict[tuple[object, ...], Config] = {}
_version = 0
#: Innermost last. Process-wide, and not a context variable: a GPU's backward pass runs on threads of autograd's own,
#: which inherit no context. Replaced, never changed, so that a reader needs no lock.
_overrides: tuple[dict[str, Config], ...] = ()
_lock = threading.Lock()


def _after_fork() -> None:
    """In a child: no other thread of the parent is here to end its override or to release the lock."""
    global _lock, _overrides
    _lock, _overrides = threading.Lock(), ()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def register(find: Finder) -> None:
    """Ask `find` before the model."""
    global _find
    _find = find
    forget()


def forget() -> None:
    """Forget every answer."""
    global _version
    _remembered.clear()
    _version += 1


def version() -> int | None:
    """A number that changes when answers may; None within `use`."""
    return None if _overrides else _version


@contextmanager
def use(**configurations: Config) -> Iterator[None]:
    """Take these configurations for their kernels inside, in every thread of the process.

    Of nested blocks, and of blocks open in several threads at once, the one entered last comes first. A graph compiled
    before keeps the plan it was traced with.

    Example:
        >>> import torch
        >>> from gssf_triton.kernels.choice import choose, use
        >>> from gssf_triton.kernels.configs import ChunkConfig
        >>> with use(chunk=ChunkConfig(16, 32)):
        ...     choose("chunk", torch.device("cpu"), torch.float32, 4096, 4096, 256, 0)
        ChunkConfig(rows=16, columns=32)
    """
    global _overrides
    with _lock:
        _overrides = (*_overrides, configurations)
    try:
        yield
    finally:
        with _lock:
            _overrides = tuple(held for held in _overrides if held is not configurations)


def is_forced(kernel: str) -> bool:
    """Whether `use` has a configuration for a kernel."""
    return any(kernel in held for held in _overrides)


def force_plan(kind: str, fold: str = "fewer") -> AbstractContextManager[None]:
    """`use` of one plan for S and for its gradients.

    Args:
        kind: One of `PLANS`.
        fold: The side to fold, as `PlanChoice.fold`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in PLANS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, PLANS))}, got {kind!r}")
    plan = PlanChoice(kind, fold)
    return use(plan=plan, gradient_plan=plan)


def device_of(call: Call) -> devices.Device:
    """The device that runs a call."""
    return devices.identify_for_torch(call.where) if call.kernel in TORCH_KERNELS else devices.identify(call.where)


def modelled(call: Call, arch: str) -> Config:
    """The model's choice for a call on an architecture, whatever Triton is installed.

    Example:
        >>> import torch
        >>> from gssf_triton.kernels.choice import Call, modelled
        >>> modelled(Call("plan", torch.device("cuda"), torch.bfloat16, True, 8192, 8192, 1024, 32), "sm_90")
        PlanChoice(kind='fold_product', fold='fewer')
    """
    kernel, _, dtype, tf32, M, N, D, B, batch = call
    if kernel in ("pairwise", "product", "terms"):
        return configs.pairwise_config(M, N, D, B, dtype, arch, terms=kernel == "terms")
    if kernel in ("fold", "paired"):
        return configs.fold_config(M, D, B, dtype, arch)
    if kernel == "gradient":
        return configs.gradient_config(B, dtype, arch, tf32=tf32 or dtype in (torch.float16, torch.bfloat16))
    if kernel == "chunk":
        return configs.chunk_config("cpu" if arch == "cpu" else "cuda")
    if kernel in ("stream", "stream_teacher"):
        return configs.stream_config(dtype, arch, teacher=kernel == "stream_teacher")
    if kernel == "ranked":
        return retrieval_config(dtype, arch, configs.dot_precision(dtype, arch, tf32=tf32))
    if kernel == "late_interaction":
        return configs.late_interaction_config(M, N, D, dtype, arch)
    if kernel == "cross_attention":
        return configs.cross_attention_config(M, N, dtype, arch)
    assert kernel in ("plan", "gradient_plan"), kernel
    return PlanChoice(modelled_plan(batch, M, N, D, B, dtype.itemsize, tf32=tf32).kind, "fewer")


def by_model(call: Call, arch: str) -> Config:
    """The model's choice for the kernels that the installed Triton makes of a call."""
    config = modelled(call, arch)
    if call.kernel == "plan" and isinstance(config, PlanChoice):
        return as_compiled(config, arch, TRITON_RELEASE)
    return config


Tiled = Literal["pairwise", "product", "terms", "stream", "stream_teacher"]
ByRows = Literal["fold", "paired"]
Plans = Literal["plan", "gradient_plan"]
Late = Literal["late_interaction"]
Cross = Literal["cross_attention"]


@overload
def choose(kernel: Tiled, where: torch.device, dtype: torch.dtype, *shape: int) -> PairwiseConfig: ...
@overload
def choose(kernel: ByRows, where: torch.device, dtype: torch.dtype, *shape: int) -> FoldConfig: ...
@overload
def choose(
    kernel: Literal["gradient"], where: torch.device, dtype: torch.dtype, *shape: int, tf32: bool | None = None
) -> GradientConfig: ...
@overload
def choose(kernel: Literal["chunk"], where: torch.device, dtype: torch.dtype, *shape: int) -> ChunkConfig: ...
@overload
def choose(kernel: Literal["ranked"], where: torch.device, dtype: torch.dtype, *shape: int) -> RetrievalConfig: ...
@overload
def choose(kernel: Late, where: torch.device, dtype: torch.dtype, *shape: int) -> LateInteractionConfig: ...
@overload
def choose(kernel: Cross, where: torch.device, dtype: torch.dtype, *shape: int) -> CrossAttentionConfig: ...
@overload
def choose(kernel: Plans, where: torch.device, dtype: torch.dtype, *shape: int) -> PlanChoice: ...
@overload
def choose(kernel: str, where: torch.device, dtype: torch.dtype, *shape: int, tf32: bool | None = None) -> Config: ...
def choose(kernel: str, where: torch.device, dtype: torch.dtype, *shape: int, tf32: bool | None = None) -> Config:
    """The configuration to launch a kernel with.

    Args:
        kernel: Its name.
        where: Where the features are.
        dtype: Their dtype.
        shape: M, N, D and, where they are not 0 and 1, B and the batch, as in `Call`.
        tf32: Whether float32 products may round to TF32; by torch's setting where None.
    """
    global _version
    for held in reversed(_overrides):
        if kernel in held:
            return held[kernel]
    if tf32 is None:
        tf32 = configs.tf32_allowed()
    at = kernel, where, dtype, tf32, shape, torch.get_num_threads() if kernel in TORCH_KERNELS else 0
    config = _remembered.get(at)
    if config is None:
        call = Call(kernel, where, dtype, tf32, *shape)
        found, lasting = _find(call)
        config = by_model(call, device_of(call).arch) if found is None else found
        if not lasting:
            _version += 1
        # "cuda" without a number is whichever device is current.
        if lasting and not (where.type == "cuda" and where.index is None):
            if len(_remembered) >= MOST_REMEMBERED:
                forget()
            _remembered[at] = config
    return config
