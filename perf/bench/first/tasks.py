"""The tasks of first_run.py, done in one of its processes: each yields rows of the results as it has them.

A task is {"name", "kind", "small", "device"} and what its kind needs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import machine
from bench.check.calls import CALLS, Problem
from bench.check.errors import NUMERICS, held_to_float64, where_wrong
from bench.check.steps import Machine, determinism, graphs
from bench.check.watch import short, watched
from bench.first import measures
from bench.first.cases import COMPILED, HEADLINE, TILES, WHOLE, Place, refusal, tile_name, tiled

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


def _problem(task: Task, place: Place) -> Problem:
    """The call and the dtype that a task names, on inputs that its name decides."""
    call = next(call for call in CALLS if call.name == task["call"])
    dtype = NUMERICS[task["numerics"]].dtype
    return Problem.make(call, place.device, dtype, zlib.crc32(call.name.encode()), place.small)


def smoke(task: Task, place: Place) -> Iterator[Row]:
    """One call in one dtype against float64; where it is wrong, where, and by which launches."""
    problem, numerics = _problem(task, place), task["numerics"]
    launches: list[dict[str, Any]] = []
    try:
        with watched() as launches:
            row, found, exact = held_to_float64(problem, numerics)
    except Exception as error:
        error.facts = _facts(problem, numerics, launches)  # type: ignore[attr-defined]
        raise
    row["kernels"] = sorted({launch["kernel"] for launch in launches}) or ["library"]
    if not row["ok"]:
        wrong = {part: where_wrong(found[part], exact[part], row["bound"]) for part in found}
        row["failure"] = _facts(problem, numerics, launches) | {"of": row["of"], "where": wrong}
    yield row


def _facts(problem: Problem, numerics: str, launches: list[dict[str, Any]]) -> dict[str, Any]:
    """What a failure is reported with."""
    tensors = {**problem.leaves, **problem.fixed}
    shapes = {name: {"shape": list(x.shape), "mod 16": [n % 16 for n in x.shape]} for name, x in tensors.items()}
    return {"call": problem.call.name, "dtype": numerics, "tensors": shapes, "launches": launches}


def compiled(task: Task, place: Place) -> Iterator[Row]:
    """What a later task launches, compiled and not launched: registers and spills, and a warm cache."""
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
        problem = _problem(task, place)
        yield lambda: problem.results("triton")
    elif of in TILES:
        yield from (tiled(of, config, place).ours for config in TILES[of][task["part"] :: task["parts"]])
    elif of in WHOLE:
        yield WHOLE[of].program(place, "gssf").call(WHOLE[of].cell.mode)
    else:
        yield HEADLINE[task["group"]][of](place).ours


def _repeated(step: Callable[[Machine], Iterator[Row]]) -> Callable[[Task, Place], Iterator[Row]]:
    """A step of gpu_check.py with one call: the same bits from repeats under load, or a capture in a CUDA graph."""

    def run(task: Task, place: Place) -> Iterator[Row]:
        repeats = SMALL_REPEATS if place.small else REPEATS
        machine = Machine(place.device, float("inf"), place.small, names=(task["call"],), repeats=repeats)
        for row in step(machine):
            yield row | {"name": task["name"]}

    return run


KINDS: dict[str, Callable[[Task, Place], Iterator[Row]]] = {
    "environment": lambda task, place: measures.environment(place, plan(place.small)),
    "ceilings": lambda task, place: measures.ceilings(place),
    "compile": compiled,
    "smoke": smoke,
    "headline": lambda task, place: measures.kernel(task["of"], HEADLINE[task["group"]][task["of"]], place),
    "tiles": lambda task, place: measures.tile(task["of"], TILES[task["of"]][task["index"]], place),
    "whole": lambda task, place: measures.whole(task["of"], WHOLE[task["of"]], place),
    "repeat": _repeated(determinism),
    "capture": _repeated(graphs),
}


def run(task: Task) -> Iterator[Row]:
    """Do a task, and leave the device's memory as it was."""
    torch.manual_seed(0)
    place = Place(torch.device(task["device"]), task["small"])
    try:
        yield from KINDS[task["kind"]](task, place)
    finally:
        if is_healthy():
            machine.release(place.device)


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

    Where all is small a part of the tasks is enough to see that they run.
    """
    smoked = [
        _task("smoke", f"{call.name}, {numerics}", call=call.name, numerics=numerics)
        for numerics in reversed(NUMERICS)
        if numerics in SMOKED and (not small or numerics == "bf16")
        for call in CALLS[:: 2 if small else 1]
    ]
    headline = [
        [_task("headline", name, of=name, group=group) for name in list(kernels)] for group, kernels in HEADLINE.items()
    ]
    parts, tiles = (1, 2) if small else (5, None)
    whole = [name for name in WHOLE if not small or name != COMPILED]
    repeated, captured = (REPEATED[:1], CAPTURED[:1]) if small else (REPEATED, CAPTURED)
    compilations = [
        *(_task("compile", kernel, of=kernel, part=i, parts=parts) for kernel in TILES for i in range(parts)),
        *(_task("compile", name, of=name) for name in whole),
        *(task | {"kind": "compile"} for group in headline for task in group),
        *(task | {"kind": "compile", "of": task["name"]} for task in smoked[:: 8 if small else 1]),
    ]
    return {
        "ceilings": [[_task("ceilings", "ceilings")]],
        "compile": [[task] for task in compilations],
        "smoke": [[task] for task in smoked],
        "headline": [group[:: 2 if small else 1] for group in headline],
        "tiles": [
            [_task("tiles", tile_name(kernel, config), of=kernel, index=i) for i, config in enumerate(configs[:tiles])]
            for kernel, configs in TILES.items()
        ],
        "calls": [[_task("whole", name, of=name)] for name in whole[:: 2 if small else 1]],
        "repeat": [
            [_task("repeat", f"{name}, bits", call=name) for name in repeated],
            [_task("capture", f"{name}, captured", call=name) for name in captured],
        ],
    }
