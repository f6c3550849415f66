"""Predict without a GPU what public calls cost on it, and what the compiler makes of their kernels.

`python -m gssf_triton.autotune.rehearse` makes the calls of `public_calls.headline` on the stub of a GPU and prints two
tables. One has a row for each public call (launches, eager operations, bytes, host time, compilations), one a row for
each kernel (registers, programs a multiprocessor, instructions, accesses, hazards, the predicted share of the tensor
cores' peak). Everything here is counted or predicted: nothing has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gssf_triton import console
from gssf_triton.autotune.binary import predicted_share
from gssf_triton.autotune.compile_gate import Case, compile_all, faults
from gssf_triton.autotune.compiled import Compiled
from gssf_triton.autotune.public_calls import CHANNELS, NUMERICS, PublicCall, headline, loss, pairwise, with_rows
from gssf_triton.autotune.rehearsal import Launch, Record, recording
from gssf_triton.autotune.stub import stub_driver, stub_host
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.kernels import devices
from gssf_triton.kernels.targets import ARCHITECTURES
from gssf_triton.progress import bar
from gssf_triton.storage import replacing

#: Rows for measuring the host's time: so few that torch's computing on the CPU hardly counts.
HOST_ROWS = 2
HOST_REPEATS = 100
#: Batch sizes: first an even and a ragged one, then others of both kinds.
FIRST_SIZES, LATER_SIZES = (256, 255), (240, 250, 300, 272, 1)
#: Calls whose compilations are counted at these sizes.
SIZED: dict[str, Callable[[int], PublicCall]] = {
    "pairwise_sim 8192×8192 B=32, normalize": lambda n: pairwise(n, n, 32),
    "info_nce 32,768 pairs": lambda n: loss("info_nce", n),
    "sigmoid_loss 32,768 pairs": lambda n: loss("sigmoid_loss", n),
    "triplet_loss 32,768 pairs": lambda n: loss("triplet_loss", n),
}


def _microseconds(call: Callable[[], Any]) -> float:
    """The median of the thread's CPU time, which a busy machine disturbs less."""
    for _ in range(5):
        call()
    samples = []
    for _ in range(HOST_REPEATS):
        start = time.thread_time()
        call()
        samples.append(time.thread_time() - start)
    return round(statistics.median(samples) * 1e6, 1)


def host_times(calls: Sequence[PublicCall], numerics: str, arch: str) -> dict[str, dict[str, float]]:
    """Host microseconds of each call, forward and backward, and of a plain product for comparison."""
    found: dict[str, dict[str, float]] = {}
    dtype = NUMERICS[numerics][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stub_host(arch), stub_driver(arch):
            a, b = (torch.randn(HOST_ROWS, 1024, dtype=dtype, requires_grad=True) for _ in range(2))
            S = a @ b.T
            found["a @ b.T"] = {
                "forward": _microseconds(lambda: a @ b.T),
                "backward": _microseconds(lambda: torch.autograd.grad(S, (a, b), S, retain_graph=True)),
            }
            for call in bar(calls, unit="call", desc="host time"):
                forward, backward = with_rows(call, HOST_ROWS).on_the_host(numerics)
                found[call.name] = {"forward": _microseconds(forward)}
                if backward is not None:
                    found[call.name]["backward"] = _microseconds(backward)
    finally:
        torch.set_num_threads(threads)
    return found


def new_compilations(make: Callable[[int], PublicCall], numerics: str, arch: str) -> dict[str, Any]:
    """The number of compilations at the first sizes, and of new ones at each later size."""
    known: set[tuple[str, str]] = set()
    later: dict[int, int] = {}
    with recording(arch) as tape:
        for size in (*FIRST_SIZES, *LATER_SIZES):
            keys = {key for record in make(size).rehearse(tape, numerics) for key in record.keys}
            if size in LATER_SIZES:
                later[size] = len(keys - known)
            known |= keys
    return {"first": len(known) - sum(later.values()), "later": later}


def _pass(record: Record) -> dict[str, Any]:
    return {
        "launches": len(record.launches),
        "compilations": len(record.distinct()),
        "eager operations": sum(record.operations.values()),
        "views and allocations": sum(record.views.values()),
        "bytes through operations": record.moved,
        "most frequent": dict(record.operations.most_common(5)),
    }


def call_rows(calls: Sequence[PublicCall], numerics: str, arch: str) -> tuple[list[dict[str, Any]], dict[Launch, Case]]:
    """A row a call, and the distinct launches of all of them."""
    rows: list[dict[str, Any]] = []
    cases: dict[Launch, Case] = {}
    with recording(arch) as tape:
        for call in bar(calls, unit="call", desc="rehearsal"):
            try:
                forward, backward = call.rehearse(tape, numerics)
            except RuntimeError as fault:
                if "meta" not in str(fault):  # meta tensors hold no values; any other error is the call's
                    raise
                rows.append({"call": call.name, "asks for a value on the host": str(fault).splitlines()[0]})
                continue
            for record in (forward, backward):
                for launch, grid in record.launches:
                    cases.setdefault(launch, Case(launch, grid, call.name))
            row: dict[str, Any] = {
                "call": call.name,
                "least bytes": call.least_bytes(numerics),
                "forward": _pass(forward),
            }
            rows.append(row | ({"backward": _pass(backward)} if call.backward else {}))
    return rows, cases


def kernel_row(case: Case, made: Compiled) -> dict[str, Any]:
    """What the compiler made of a launch: a row of the table and of the JSON."""
    launch, facts = case.launch, made.facts
    M, N = launch.constant("BLOCK_M"), launch.constant("BLOCK_N")
    entries = M * N if M and N else None
    threads = launch.num_warps * ARCHITECTURES[launch.arch].warp
    # Iterations of the inner loop: a call's channels divided by the tile's.
    share = predicted_share(facts, launch.arch, iterations=max(1, CHANNELS // (launch.constant("BLOCK_K") or CHANNELS)))
    outside = facts.instructions - facts.loop_instructions
    return {
        "kernel": launch.name,
        "arch": launch.arch,
        "numerics": launch.numerics,
        "tile": launch.tile,
        "first call": case.call,
        "registers": facts.registers,
        "programs an SM": facts.programs_per_sm,
        "shared bytes": facts.shared,
        "spills": facts.spills,
        "wgmma": [list(row) for row in facts.wgmma],
        "mma.sync": facts.mma_sync,
        "loop": dict(facts.loop),
        "instructions an iteration": facts.loop_instructions,
        "instructions an entry": round(outside * threads / entries, 1) if entries else None,
        "widths": dict(facts.ptx_widths),
        "asynchronous loads": {str(width): count for width, count in facts.cp_async.items()},
        "tensor copies": facts.tma,
        "accesses": [asdict(access) for access in facts.accesses],
        "serialised": len(facts.serialised),
        "hazards": list(facts.hazards),
        "predicted share": None if share is None else round(share, 3),
        "broken rules": faults(case, made),
    }


def render_calls(rows: Sequence[dict[str, Any]], host: dict[str, dict[str, float]]) -> str:
    """The table of calls."""
    head = (
        f"{'public call':58} {'launches':>11} {'eager ops':>13} {'GB through them':>17} {'least, GB':>9} "
        f"{'host µs':>13} {'new sizes':>9}"
    )
    lines = [head]
    for row in rows:
        if "forward" not in row:
            lines.append(f"{row['call']:58} asks for a value on the host: {row['asks for a value on the host']}")
            continue
        passes = [row[name] for name in ("forward", "backward") if name in row]

        def both(what: str, passes: list[dict[str, Any]] = passes) -> str:
            return " + ".join(str(p[what]) for p in passes)

        moved = " + ".join(f"{p['bytes through operations'] / 1e9:.2f}" for p in passes)
        times = " + ".join(f"{t:.0f}" for t in host.get(row["call"], {}).values())
        later = row.get("new compilations", {}).get("later")
        more = "" if later is None else str(sum(later.values()))
        lines.append(
            f"{row['call']:58} {both('launches'):>11} {both('eager operations'):>13} {moved:>17} "
            f"{row['least bytes'] / 1e9:9.2f} {times:>13} {more:>9}"
        )
    return "\n".join(lines)


def render_kernels(rows: Sequence[dict[str, Any]]) -> str:
    """The table of kernels."""
    lines = [
        f"{'target':7} {'kernel':24} {'numerics':11} {'tile':28} {'regs':>4} {'progs':>5} {'shared':>7} {'spill':>5} "
        f"{'wgmma (from registers)':30} {'loop':>5} {'entry':>6} {'loads and stores':34} {'async':>8} "
        f"{'serial':>6} {'hazard':>6} {'share':>6}"
    ]
    for row in rows:
        wgmma = " ".join(f"{count}×{shape}" + (f"({regs})" if regs else "") for shape, count, regs in row["wgmma"])
        widths = " ".join(f"{count}×{width}" for width, count in sorted(row["widths"].items()))
        share = row["predicted share"]
        loads = " ".join(f"{n}×{width}" for width, n in row["asynchronous loads"].items())
        lines.append(
            f"{row['arch']:7} {row['kernel']:24} {row['numerics']:11} {row['tile']:28} {row['registers']:4d} "
            f"{row['programs an SM']:5d} {row['shared bytes']:7,d} {row['spills']:5d} "
            f"{wgmma or (str(row['mma.sync']) + '×mma.sync' if row['mma.sync'] else '-'):30} "
            f"{row['instructions an iteration']:5d} {row['instructions an entry'] or '-':>6} {widths:34} {loads:>8} "
            f"{'yes' if row['serialised'] else 'no':>6} {len(row['hazards']):6d} "
            f"{'-' if share is None else f'{share:.0%}':>6}"
        )
    return "\n".join(lines)


def rehearse(architectures: Sequence[str], numerics: str, jobs: int, *, host: bool = True) -> dict[str, Any]:
    """Both tables as data: calls on the first architecture, kernels on all."""
    calls, (first, *others) = headline(numerics), architectures
    rows, cases = call_rows(calls, numerics, first)
    for row in rows:
        sized = SIZED.get(row["call"])
        if sized is not None:
            row["new compilations"] = new_compilations(sized, numerics, first)
    for arch in others:
        cases |= call_rows(calls, numerics, arch)[1]
    made = compile_all([case.launch for case in cases.values()], jobs, instructions=True)
    return {
        "schema": 1,
        "architectures": list(architectures),
        "numerics": numerics,
        "versions": {name: devices.package_version(name) for name in ("torch", "triton", "gssf_triton")},
        "calls": rows,
        "host microseconds": host_times(calls, numerics, first) if host else {},
        "kernels": [kernel_row(case, made[launch]) for launch, case in cases.items()],
    }


def main(argv: Sequence[str] | None = None) -> int:
    console.ready()
    known = list(ARCHITECTURES)
    parser = argparse.ArgumentParser(prog="gssf_triton.autotune.rehearse", description=__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=known, default=["sm_90", *(x for x in known if x != "sm_90")],
        help="targets; calls are counted on the first (default: all, sm_90 first)",
    )  # fmt: skip
    parser.add_argument("--numerics", choices=list(NUMERICS), default="bf16", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--no-host", action="store_true", help="do not measure the host's time")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write both tables' data there, too")
    args = parser.parse_args(argv)
    if args.out:
        try:
            check_output("--out", args.out)
        except UsageError as fault:
            parser.error(str(fault))
    found = rehearse(args.arch, args.numerics, args.jobs, host=not args.no_host)
    if not console.leads_to(sys.stdout, args.out):
        print(f"{render_calls(found['calls'], found['host microseconds'])}\n\n{render_kernels(found['kernels'])}")
    if args.out:
        with replacing(args.out) as file:
            file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
