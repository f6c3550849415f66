"""The tasks of first_run.py, done in one of its processes: each yields rows of the results as it has them.

A task is {"name", "kind", "small", "device"} and what its kind needs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import _first_measures
import _machine
import torch
from _check_calls import CALLS, Problem
from _check_steps import Machine, determinism, graphs
from _errors import NUMERICS, held_to_float64
from _first_cases import COMPILED, HEADLINE, TILES, WHOLE, Place, refusal, tile_name, tiled
from _first_environment import ceilings, environment
from _watch import short, watched
from _where import where_wrong

Task = dict[str, Any]
Row = dict[str, Any]

#: Of the smoke test.
SMOKED = {"bf16", "fp32"}
#: Calls whose bits are compared, and those that are captured in a graph: one of each kind of kernel.
REPEATED = (
    "pairwise_sim, one pass", "pairwise_sim, fold + product", "info_nce", "sigmoid_loss", "triplet_loss, all",
    "late_interaction, masks", "topk", "ranks",
)  # fmt: skip
CAPTURED = (
    "pairwise_sim, one pass", "pairwise_sim, fold + product", "info_nce", "sigmoid_loss", "cross_attention_sim", "topk",
)  # fmt: skip
REPEATS, SMALL_REPEATS = 20, 2


def _place(task: Task) -> Place:
    return Place(torch.device(task["device"]), task["small"])


def _call(name: str) -> Any:
    return next(call for call in CALLS if call.name == name)


def smoke(task: Task) -> Iterator[Row]:
    """One call in one dtype against float64; where it is wrong, where, and by which launches."""
    place, call = _place(task), _call(task["call"])
    numerics = next(n for n in NUMERICS if n.name == task["numerics"])
    problem = Problem.make(call, place.device, numerics.dtype, zlib.crc32(call.name.encode()), place.small)
    launches: list[dict[str, Any]] = []
    try:
        with watched() as launches:
            row, found, exact = held_to_float64(problem, numerics)
    except Exception as error:
        error.facts = _facts(problem, numerics.name, launches)  # type: ignore[attr-defined]
        raise
    row["kernels"] = sorted({launch["kernel"] for launch in launches}) or ["library"]
    if not row["ok"]:
        wrong = {part: where_wrong(found[part], exact[part], row["bound"]) for part in found}
        row["failure"] = _facts(problem, numerics.name, launches) | {"of": row["of"], "where": wrong}
    yield row


def _facts(problem: Problem, numerics: str, launches: list[dict[str, Any]]) -> dict[str, Any]:
    """What a failure is reported with."""
    tensors = {**problem.leaves, **problem.fixed}
    shapes = {name: {"shape": list(x.shape), "mod 16": [n % 16 for n in x.shape]} for name, x in tensors.items()}
    return {"call": problem.call.name, "dtype": numerics, "tensors": shapes, "launches": launches}


def compiled(task: Task) -> Iterator[Row]:
    """What a later task launches, compiled and not launched: registers and spills, and a warm cache."""
    place = _place(task)
    row: Row = {"name": task["of"], "ok": True}
    began = time.perf_counter()
    with watched(launch=False) as launches:
        for call in _to_compile(task, place):
            try:
                call()
            except RuntimeError as error:
                row["reason"] = refusal(error)
    seconds = time.perf_counter() - began
    distinct = {short(launch): launch for launch in launches}
    for text, launch in distinct.items():
        facts = {name: launch.get(name) for name in ("registers", "spills", "shared")}
        yield {"name": f"{task['of']}: {text}", "ok": not launch.get("spills"), **facts}
    yield row | {"seconds": round(seconds, 2), "kernels": len(distinct)}


def _to_compile(task: Task, place: Place) -> Iterator[Callable[[], Any]]:
    of = task["of"]
    if "call" in task:
        numerics = next(n for n in NUMERICS if n.name == task["numerics"])
        call = _call(task["call"])
        problem = Problem.make(call, place.device, numerics.dtype, zlib.crc32(call.name.encode()), place.small)
        yield lambda: problem.results("triton")
    elif of in TILES:
        yield from (tiled(of, config, place).ours for config in TILES[of][task["part"] :: task["parts"]])
    elif of in WHOLE:
        for _, program in WHOLE[of].programs(place, ("gssf",)):
            yield program.call(WHOLE[of].mode)
    else:
        build = next(group[of] for group in HEADLINE.values() if of in group)
        yield build(place).ours


def repeats(task: Task) -> Iterator[Row]:
    """The same bits from many repeats of one call under load."""
    for row in determinism(_one_call(task)):
        yield row | {"name": task["name"]}


def capture(task: Task) -> Iterator[Row]:
    """One call, both passes, captured in a CUDA graph and replayed."""
    for row in graphs(_one_call(task)):
        yield row | {"name": task["name"]}


def _one_call(task: Task) -> Machine:
    place = _place(task)
    repeats = SMALL_REPEATS if place.small else REPEATS
    return Machine(place.device, float("inf"), place.small, names=(task["call"],), repeats=repeats)


def _headline(task: Task) -> Iterator[Row]:
    group = next(group for group in HEADLINE.values() if task["of"] in group)
    yield from _first_measures.kernel(task["of"], group[task["of"]], _place(task))


def _tiles(task: Task) -> Iterator[Row]:
    yield from _first_measures.tile(task["of"], TILES[task["of"]][task["index"]], _place(task))


def _whole(task: Task) -> Iterator[Row]:
    yield from _first_measures.whole(task["of"], WHOLE[task["of"]], _place(task))


KINDS: dict[str, Callable[[Task], Iterator[Row]]] = {
    "environment": lambda task: environment(_place(task), plan(task["small"])),
    "ceilings": lambda task: ceilings(_place(task)),
    "compile": compiled,
    "smoke": smoke,
    "headline": _headline,
    "tiles": _tiles,
    "whole": _whole,
    "repeat": repeats,
    "capture": capture,
}


def run(task: Task) -> Iterator[Row]:
    """Do a task, and leave the device's memory as it was."""
    torch.manual_seed(0)
    place = _place(task)
    try:
        yield from KINDS[task["kind"]](task)
    finally:
        if is_healthy():
            _machine.release(place.device)


def is_healthy() -> bool:
    """False after a fault that leaves a CUDA context unusable."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _task(kind: str, name: str, **facts: Any) -> Task:
    return {"kind": kind, "name": name, **facts}


def plan(small: bool) -> dict[str, list[list[Task]]]:
    """Stage → groups of tasks, each group for a process of its own; the longest compilations first.

    Where all is small, what tells of speed alone is there once a kind: it is to be seen that it runs.
    """
    smoked = [
        _task("smoke", f"{call.name}, {numerics.name}", call=call.name, numerics=numerics.name)
        for numerics in reversed(NUMERICS)
        if numerics.name in SMOKED
        for call in CALLS[:: 2 if small else 1]
        if not small or numerics.name == "bf16"
    ]
    kernels = [name for group in HEADLINE.values() for name in group]
    parts, tiles = (1, 2) if small else (5, None)
    whole = [name for name in WHOLE if not small or name != COMPILED]
    repeated, captured = (REPEATED[:1], CAPTURED[:1]) if small else (REPEATED, CAPTURED)
    compilations = [
        *(_task("compile", kernel, of=kernel, part=i, parts=parts) for kernel in TILES for i in range(parts)),
        *(_task("compile", name, of=name) for name in (*whole, *kernels)),
        *(_task("compile", task["name"], of=task["name"], **_smoked(task)) for task in smoked[:: 8 if small else 1]),
    ]
    if small:
        whole = whole[::2]
    return {
        "ceilings": [[_task("ceilings", "ceilings")]],
        "compile": [[task] for task in compilations],
        "smoke": [[task] for task in smoked],
        "headline": [
            [_task("headline", name, of=name) for name in list(group)[:: 2 if small else 1]]
            for group in HEADLINE.values()
        ],
        "tiles": [
            [_task("tiles", tile_name(kernel, config), of=kernel, index=i) for i, config in enumerate(configs[:tiles])]
            for kernel, configs in TILES.items()
        ],
        "calls": [[_task("whole", name, of=name)] for name in whole],
        "repeat": [
            [_task("repeat", f"{name}, bits", call=name) for name in repeated],
            [_task("capture", f"{name}, captured", call=name) for name in captured],
        ],
    }


def _smoked(task: Task) -> dict[str, str]:
    return {"call": task["call"], "numerics": task["numerics"]}
