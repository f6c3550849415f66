"""Training with batches that are larger than the towers' memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from gssf_triton import checks
from gssf_triton.tracing import Leaf

__all__ = ["CachedBackward"]

#: Stands for a tensor.
PLACE = torch.empty((), device="meta")


class CachedBackward(Leaf):
    """A tower that takes large batches in the memory of small ones: gradient caching.

    It is called as the tower is, and returns the same features. The forward pass runs the tower chunk by chunk, without
    a graph, and keeps the features alone. The backward pass runs it again, chunk by chunk, each with the random state,
    the buffers and the training modes it had, and takes the gradient of that chunk's features through it. So the graph
    of one chunk exists at a time, and the loss sees the whole batch: its gradients are the whole batch's. The tower
    runs forward twice; its buffers, such as running averages, move once.

    What follows the features is up to you: any loss, with `group=` or without. Wrap each tower (one that serves both
    sides once); autocast, GradScaler, gradient accumulation, DistributedDataParallel and `fully_shard` are used as
    without. docs/training.md shows a whole model.

    Args:
        tower: A module that returns one tensor of features, a row for each row of its inputs: (N, D), say. One that
            returns more wants a small module around it, which picks the features.
        chunk_size: Rows of a chunk. The last chunk may be shorter.

    Inputs: what the tower takes. Tensors and lists hold one entry a row, and are cut, also in tuples and mappings (a
    tokenizer's output). Numbers, texts, None and tensors without dimensions go to every chunk as they are.

    Not as in one large batch: layers that mix rows see those of their chunk, so BatchNorm normalises by a chunk's
    statistics, and its running averages move once a chunk. Of random states, PyTorch's are kept, Python's and NumPy's
    are not; nor is what a tower keeps elsewhere than in buffers. Under `fully_shard` all processes need as many chunks,
    and the first pass has a graph, without its tensors.

    Held from the forward to the backward pass: the inputs, the features, a copy of the tower's buffers, and for each
    chunk its random states and a copy of the buffers that the chunk before it changed.

    Raises:
        TypeError: a tower that is no module or returns no tensor, or a chunk size that is no int.
        ValueError: a chunk size below 1, inputs without rows or of different numbers of them, or other features than
            one a row.
        RuntimeError: in the backward pass, where parameters or inputs were changed in place since the forward pass, or
            the gradient reaches no parameter of the tower (`FullyShardedDataParallel`'s compute in place of its own).

    Source:
        Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021
        (arXiv 2101.06983). The similarity of the losses: Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF, InfoNCELoss
        >>> from gssf_triton.training import CachedBackward
        >>> images = CachedBackward(torch.nn.Linear(48, 64), chunk_size=16)
        >>> texts = CachedBackward(torch.nn.Linear(32, 64), chunk_size=16)
        >>> loss = InfoNCELoss(GSSF(dim=64, block_size=16))
        >>> loss(images(torch.randn(100, 48)), texts(torch.randn(100, 32))).backward()
        >>> images.tower.weight.grad.shape
        torch.Size([64, 48])
    """

    def __init__(self, tower: nn.Module, *, chunk_size: int) -> None:
        super().__init__()
        checks.check_module("tower", tower)
        checks.check_count("chunk_size", chunk_size, 1)
        self.tower = tower
        self.chunk_size = chunk_size

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The tower's features of these inputs, (N, …)."""
        run = self._features
        if torch.compiler.is_compiling():  # what is in the tower may be compiled. As a decorator it would import Triton
            run = torch.compiler.disable(run, recursive=False)
        return run(*args, **kwargs)

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        rows, size = _rows(args, kwargs), self.chunk_size
        slices = [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]
        shared: list[Tensor] = [x for x in self.tower.parameters() if x.requires_grad]
        inputs: list[Tensor] = []
        in_lists: list[Any] = []

        def without_tensors(x: Tensor | list[Any]) -> object:
            if isinstance(x, list):
                leaves, form = tree_flatten(list(x))
                for leaf in leaves:
                    _each(in_lists.append, leaf)
                return tree_unflatten(leaves, form)  # a copy: the list may change before the backward pass
            inputs.append(x)
            return PLACE

        form = _each(without_tensors, (args, kwargs))
        in_lists = [x for x in in_lists if isinstance(x, Tensor)]
        shared.extend(x for x in in_lists if x.requires_grad)
        held = (*self.tower.parameters(), *self.tower.buffers(), *inputs)
        devices = list({x.device for x in held if x.device.type not in ("cpu", "meta")})
        again = torch.is_grad_enabled() and any(x.requires_grad for x in (*shared, *inputs))
        call = _Call(self.tower, form, slices, shared, devices, again)
        call.watch(in_lists)
        features: Tensor = (_checkpointed if _is_sharded(self.tower) else _Cached.apply)(call, *shared, *inputs)
        return features

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


def _is_sharded(tower: nn.Module) -> bool:
    """True for a tower with parts under `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and unused where nobody has
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in tower.modules())


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with each tensor and list in it replaced by the function's result."""
    if isinstance(value, (Tensor, list)):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _each(function, part) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_each(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of rows that all inputs have."""
    found: dict[str, int] = {}
    for name, value in [*enumerate(args), *kwargs.items()]:
        parts: list[Any] = []
        _each(parts.append, value)
        with_rows = [x for x in parts if isinstance(x, list) or x.dim()]
        for place, x in enumerate(with_rows):
            found[f"{name}[{place}]" if len(with_rows) > 1 else f"{name}"] = len(x)
    if not found:
        raise ValueError("the tower's inputs must have rows: tensors or lists, got none")
    if len({*found.values()}) > 1:
        came = ", ".join(f"input {name} has {length}" for name, length in found.items())
        raise ValueError(f"the tower's inputs must have the same number of rows: {came}")
    return next(iter(found.values()))


def _version(x: Tensor | None) -> int:
    """How often this tensor was changed in place, where PyTorch counts it."""
    return 0 if x is None or x.is_inference() else x._version


class _Buffer(NamedTuple):
    """A buffer as a chunk found it."""

    present: Tensor | None
    version: int
    copy: Tensor | None


class _Before(NamedTuple):
    """What a chunk found: random states, and the buffers in the order of `_Call.buffers`."""

    random: list[Tensor]
    buffers: list[_Buffer]


@dataclass
class _Call:
    """One call of a tower: what its backward pass needs to repeat it, but for the tensors among the inputs.

    Attributes:
        form: The positional and the named inputs, with PLACE where tensors were.
        slices: The rows of each chunk.
        shared: Parameters, and tensors in lists, that want gradients: any chunk may use any of them.
        devices: Where the tower and its inputs lie, besides the CPU.
        again: Whether a backward pass can follow.
        modes: Autocast as it was at the call, by device type: (dtype, enabled).
        training: Each module, with its training mode at the call.
        buffers: Where the tower's buffers are: a module's dictionary, and a name in it.
    """

    tower: nn.Module
    form: tuple[tuple[Any, ...], dict[str, Any]]
    slices: list[slice]
    shared: list[Tensor]
    devices: list[torch.device]
    again: bool

    def __post_init__(self) -> None:
        kinds = {"cpu", *(device.type for device in self.devices)}
        self.modes = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}
        self.training = [(module, module.training) for module in self.tower.modules()]
        modules = self.tower.modules() if self.again else ()
        self.buffers = [(module._buffers, name) for module in modules for name, _ in module._buffers.items()]
        self._copied: dict[int, _Buffer] = {}
        self._watched: list[tuple[Tensor, int]] = []

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """Have the second pass refuse changes of these."""
        self._watched += [(x, _version(x)) for x in tensors]

    def part(self, rows: slice, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """These rows of the inputs, which follow `shared` among the tensors."""
        return [x[rows] if x.dim() else x for x in tensors[len(self.shared) :]]

    def features(self, rows: slice, inputs: list[Tensor]) -> Tensor:
        """The tower's features of these rows, given the inputs' own."""
        given = iter(inputs)
        args, kwargs = _each(lambda x: x[rows] if isinstance(x, list) else next(given), self.form)
        with ExitStack() as modes:
            # No cache: a weight's rounded copy that was made without a graph would be found by the pass with one.
            for kind, mode in self.modes.items():
                modes.enter_context(torch.autocast(kind, *mode, cache_enabled=False))
            found = self.tower(*args, **kwargs)
        wanted = rows.stop - rows.start
        if not isinstance(found, Tensor):
            raise checks.wrong_type("what the tower returns", "one tensor of features", found)
        if not found.dim() or len(found) != wanted:
            raise checks.wrong_shape("what the tower returns", f"({wanted}, ...), a row for each of its inputs", found)
        return found

    def random_states(self) -> list[Tensor]:
        of_devices = [torch.get_device_module(device).get_rng_state(*_number(device)) for device in self.devices]
        return [torch.get_rng_state(), *of_devices]

    def set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, *_number(device))

    def before(self) -> _Before:
        """What the next chunk finds. Buffers that did not change since the last one share its copy."""
        found = []
        for buffers, name in self.buffers:
            x = buffers[name]
            known = self._copied.get(id(x))
            if known is None or known.version != _version(x):
                known = self._copied[id(x)] = _Buffer(x, _version(x), None if x is None else x.detach().clone())
            found.append(known)
        return _Before(self.random_states(), found)

    @contextmanager
    def repeating(self, before: _Before) -> Iterator[None]:
        """A second pass of a chunk, from what it found: it leaves all as it is now, and calls no hook."""
        if any(_version(x) != version for x, version in self._watched):
            raise RuntimeError("a tensor in the tower's inputs was changed in place since the forward pass")
        present = self.random_states()
        training = [(module, module.training) for module, _ in self.training]
        buffers = [(place, name, place[name]) for place, name in self.buffers]
        hooks = [(x._backward_hooks, dict(x._backward_hooks)) for x in self.shared if x._backward_hooks]
        try:
            self.set_random_states(before.random)
            for module, mode in self.training:
                module.training = mode
            # Others take the buffers' places: to write to them would spoil graphs that saved them.
            copies = {id(x): None if x.copy is None else x.copy.clone() for x in before.buffers}
            for (place, name), x in zip(self.buffers, before.buffers, strict=True):
                place[name] = copies[id(x)]
            for registered, _ in hooks:
                registered.clear()
            yield
        finally:
            for place, name, buffer in buffers:
                place[name] = buffer
            for module, mode in training:
                module.training = mode
            for registered, called in hooks:
                registered.update(called)
            self.set_random_states(present)


def _number(device: torch.device) -> tuple[torch.device, ...]:
    """How a device's random state is asked for: Apple's GPU has no number."""
    return () if device.type == "mps" else (device,)


class _Afresh:
    """A context manager that every entry makes anew: a graph that is kept has several backward passes."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.entered = self.make()
        self.entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.__exit__(*error)


def _checkpointed(call: _Call, *tensors: Tensor) -> Tensor:
    """The features of a tower under FSDP, which wants to see one graph: each chunk's, but for the tensors in it."""
    call.watch(tensors[len(call.shared) :])
    return torch.cat([
        checkpoint(
            call.features, rows, call.part(rows, tensors), use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _Afresh(partial(call.repeating, call.before()))),
        )
        for rows in call.slices
    ])  # fmt: skip


class _Cached(torch.autograd.Function):
    """The features of any other tower: forward without a graph, backward chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.found = call, []
        ctx.save_for_backward(*tensors)
        chunks = []
        for rows in call.slices:
            ctx.found.append(call.before())
            chunks.append(call.features(rows, call.part(rows, tensors)))
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors, count = ctx.saved_tensors, len(call.shared)
        sums: list[Tensor | None] = [None] * count
        of_inputs = [torch.zeros_like(x) if x.requires_grad else None for x in tensors[count:]]
        wanted = [x for x in of_inputs if x is not None]
        for rows, before in zip(call.slices, ctx.found, strict=True):
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in call.part(rows, tensors)]
            leaves = [*call.shared, *(x for x in inputs if x.requires_grad)]
            with call.repeating(before), torch.enable_grad():
                features = call.features(rows, inputs)
                if not features.requires_grad:
                    continue
                found = torch.autograd.grad(features, leaves, grad[rows], allow_unused=True)
            if all(part is None for part in found):
                raise RuntimeError(
                    "the gradient of a tower's features reaches none of its parameters: those that compute must be the "
                    "tower's own (shard it with fully_shard, not with FullyShardedDataParallel)"
                )
            for place, part in enumerate(found[:count]):
                if part is not None:
                    # Sums of half-precision gradients are kept in float32.
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    earlier = sums[place]
                    sums[place] = part if earlier is None else earlier + part
            for total, part in zip(wanted, found[count:], strict=True):
                if part is not None:
                    (total[rows] if total.dim() else total).add_(part)
            del features, found
        of_shared = [None if x is None else x.to(like.dtype) for x, like in zip(sums, call.shared, strict=True)]
        return None, *of_shared, *of_inputs
