"""The tuner's command line: `python -m gssf_triton.autotune tune | show | check | export | doctor`.

Exit status: 0 done, 1 something failed or is left to do, 2 a command that makes no sense.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gssf_triton import console
from gssf_triton.autotune import compile_gate, hook, lookup, tuner
from gssf_triton.autotune.shapes import (
    CPU_KERNELS,
    GPU_KERNELS,
    SETS,
    Shape,
    calls_of,
    keys_for,
    numerics_in,
    parse_shape,
    read_shapes,
)
from gssf_triton.autotune.space import DTYPES, NUMERICS, SPACES, Key, make_key
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Entry, Table, TableError, parse, render, shipped
from gssf_triton.backend import interpreter_is_on, resolve_backend
from gssf_triton.command.usage import Parser, UsageError, check_output, default_device, parse_device, positive
from gssf_triton.kernels import choice, devices, toolchain
from gssf_triton.kernels.choice import TORCH_KERNELS, Call, device_of
from gssf_triton.kernels.devices import Device
from gssf_triton.kernels.release import HAS_TRITON
from gssf_triton.kernels.targets import KNOWN_CARDS
from gssf_triton.progress import bar
from gssf_triton.storage import CACHE_VARIABLE, read_text, replacing


def _shapes(args: argparse.Namespace, default: str) -> list[Shape]:
    """From --shape, --shapes and --set, or the set by default."""
    found: list[Shape] = []
    try:
        for text in args.shape or []:
            found += parse_shape(text, args.dtype)
        if args.shapes:
            found += read_shapes(args.shapes)
    except ValueError as fault:
        raise UsageError(str(fault)) from None
    except OSError as fault:
        raise UsageError(f"--shapes: {args.shapes} cannot be read ({fault.strerror})") from None
    if args.set or not found:
        found += SETS[args.set or default]
    return found


def _kernels(args: argparse.Namespace, where: torch.device) -> tuple[str, ...]:
    if not args.kernel:
        return GPU_KERNELS if where.type == "cuda" else CPU_KERNELS
    triton_kernels = [name for name in args.kernel if name not in TORCH_KERNELS]
    if where.type == "cpu" and triton_kernels and not interpreter_is_on():
        raise UsageError(
            f"--kernel {triton_kernels[0]} needs a GPU, or, to try the tuner out, Triton's interpreter "
            "(TRITON_INTERPRET=1)"
        )
    return tuple(args.kernel)


def tune(args: argparse.Namespace) -> int:
    """Tune keys one by one, with a progress bar, writing each down."""
    where = parse_device(args.device)
    on_cpu = where.type == "cpu"
    keys = keys_for(_shapes(args, "cpu" if on_cpu else "full"), _kernels(args, where), on_cpu=on_cpu)
    if args.dry_run:
        print("\n".join(map(str, tuner.in_order(keys))))
        return 0
    with bar(total=len(keys), unit="key", desc="tuning", disable=args.quiet) as shown:

        def progress(key: Key, outcome: str) -> None:
            shown.update()
            if not args.quiet:
                shown.write(f"{key}: {outcome}")

        try:
            limits = {"time_limit": args.time_limit, "most_candidates": args.candidates}
            report = tuner.tune(keys, where, force=args.force, progress=progress, **limits)
        except KeyboardInterrupt:
            shown.close()
            print("stopped; what was found is kept, the same command goes on from here")
            return 1
    print(
        f"{len(report.tuned)} tuned, {len(report.skipped)} tuned before, {len(report.failed)} failed, "
        f"{len(report.left)} left" + ("; the same command goes on from here" if report.left else "")
    )
    return 1 if report.failed or report.left else 0


def _named_device(name: str) -> Device:
    """A device that is not here, by its slug or its architecture."""
    for slug, arch, names in KNOWN_CARDS:
        if name in (slug, arch):
            return Device(slug, names[0], arch)
    known = ", ".join(f"{slug} ({arch})" for slug, arch, _ in KNOWN_CARDS)
    raise UsageError(f"--for: {name!r} is none of {known}")


def show(args: argparse.Namespace) -> int:
    """What would run for each shape, and why."""
    target = _named_device(args.target) if args.target else None
    where = torch.device("cuda", 0) if target else parse_device(args.device)
    on_cpu = where.type == "cpu"
    for shape in _shapes(args, "quick"):
        print(f"M={shape.M} N={shape.N} D={shape.D} B={shape.B} {shape.dtype}")
        lines: dict[str, None] = {}  # an ordered set: both gradients of a square S ask for the same
        for kernel, M, N, B in calls_of(shape, args.kernel or (CPU_KERNELS if on_cpu else GPU_KERNELS)):
            key = make_key(kernel, numerics_in(kernel, shape.dtype, on_cpu=on_cpu), M, N, shape.D, B)
            call = Call(kernel, where, DTYPES[key.dtype], shape.dtype == "tf32", M, N, shape.D, B)
            device = target or device_of(call)
            found = lookup.find(key, device.arch, _entries(device, is_here=target is None))
            if found:
                config, why = found.entry.config, f"{found.why}, {found.entry.seconds * 1e3:.4g} ms"
            else:
                config, why = choice.by_model(call, device.arch), "model: no table has this key or a tuned neighbour"
            lines[f"  {key}\n    {config}\n    {why}"] = None
        print("\n".join(lines))
    return 0


def _entries(device: Device, *, is_here: bool) -> Mapping[Key, Entry]:
    """What tables hold for a device: the package's alone for one that is not here."""
    if not is_here:
        return lookup.shipped_entries(device)
    return {} if hook.mode() == "off" else lookup.entries_for(device)


def _read_tables(paths: Sequence[Path]) -> list[Table]:
    if not paths:
        return shipped()
    tables = []
    for path in paths:
        try:
            tables.append(parse(read_text(path)))
        except TableError as fault:
            raise TableError(f"{path}: {fault}") from None
        except (OSError, ValueError) as fault:
            raise UsageError(f"{path} cannot be read ({fault})") from None
    return tables


def check(args: argparse.Namespace) -> int:
    """Every configuration of the tables: legal, and through the compile gate."""
    try:
        tables = _read_tables(args.table)
    except TableError as fault:
        print(f"refused: {fault}")
        return 1
    entries = sum(len(table.entries) for table in tables)
    print(f"{len(tables)} table(s), {entries} entries, all legal")
    if args.no_compile:
        return 0
    cases = [case for table in tables for case in compile_gate.table_cases(table)]
    if not cases:
        print("no kernel to compile")
        return 0
    return 1 if compile_gate.run(cases, args.jobs, verbose=not args.quiet) else 0


def export(args: argparse.Namespace) -> int:
    """The user's results as a table that can ship: what holds for the device, without what holds for this machine."""
    where = parse_device(args.device)
    here = {devices.identify(where), devices.identify_for_torch(where)}
    found = {
        device: Table(device.slug, device.arch, (device.name,), {}, entries)
        for device in here
        if (entries := lookup.store_for(device).read())
    }
    if not found:
        print("nothing to export: nothing was tuned here yet (see `tune`)")
        return 1
    if len(found) > 1:
        # On a CPU the interpreter has results, too; its times mean nothing elsewhere.
        found.pop(devices.INTERPRETER, None)
    (table,) = found.values()
    if args.name:
        table = replace(table, slug=devices.slug(args.name))
    text = render(table)
    assert parse(text) == table
    target = args.out or Path(f"{table.slug}.json")
    if str(target) == "-":
        print(text, end="")
        return 0
    if not os.path.isdir(target.parent):
        raise UsageError(f"--out: {target} cannot be written: {target.parent} is no folder")
    # The table lacks what holds for this machine alone: in the cache's place it would be refused.
    check_output("--out", target, *(lookup.store_for(device).path for device in here))
    try:
        with replacing(target) as file:
            file.write(text.encode())
    except OSError as fault:
        raise UsageError(f"--out: {target} cannot be written ({fault.strerror})") from None
    console.say(f"{target}: {len(table.entries)} entries for {table.slug}", target)
    return 0


def _cache_state(store: Store) -> str:
    if store.path is None:
        return f"this user has no cache directory, {CACHE_VARIABLE} chooses one"
    try:
        store.path.stat()
    except FileNotFoundError:
        return "none yet"
    except OSError as fault:
        return f"cannot be used ({fault})"
    entries = store.read()
    aside = len(list(store.path.parent.glob(f"{store.path.name}.broken-*")))
    return f"{len(entries)} entries" + (f", {aside} broken file(s) set aside" if aside else "")


def _assembler(device: Device) -> str:
    """What assembles the kernels, and which of them it keeps from running; without a GPU, for Hopper's."""
    if not HAS_TRITON:
        return "none without Triton"
    if device.arch in ("cpu", "interpreter"):
        return f"for sm_90 it would be {toolchain.describe('sm_90')}"
    return toolchain.describe(device.arch)


def doctor(args: argparse.Namespace) -> int:
    """What a bug report needs."""
    where = parse_device(args.device)
    device = devices.identify_for_torch(where)
    try:
        tables = ", ".join(table.slug for table in shipped() if table.serves(device)) or "none for this device"
    except TableError as fault:
        tables = f"DAMAGED: {fault}"
    sample = torch.empty(1, 1, device=where, dtype=torch.bfloat16)
    store = Store(device)
    lines = {
        "gssf_triton": devices.package_version("gssf_triton"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}, ROCm {torch.version.hip})",
        "triton": devices.package_version("triton") if HAS_TRITON else "not installed",
        "device": f"{where}: {device.name} ({device.slug}, {device.arch})",
        "driver": devices.driver(device),
        "processor": f"{devices.cpu_model()}, {devices.cores()} core(s), {torch.get_num_threads()} thread(s)",
        "backend": f"auto takes {resolve_backend('auto', sample, None)}",
        "assembler": _assembler(device),
        "interpreter": "on" if interpreter_is_on() else "off",
        hook.VARIABLE: f"{hook.mode()} (environment: {os.environ.get(hook.VARIABLE, 'not set')})",
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tables shipped": tables,
        "user's cache": str(store.path or "nowhere"),
        "cache state": _cache_state(store),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", action="append", metavar="MxNxDxB", help="a shape; may be given many times")
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="a JSON list of objects with M, N, D, B and dtype")
    parser.add_argument("--set", choices=list(SETS), help="a set of shapes")
    parser.add_argument("--dtype", nargs="+", choices=NUMERICS, default=["bf16"], help="of --shape (default: bf16)")
    parser.add_argument("--kernel", nargs="+", choices=list(SPACES), metavar="KERNEL", help=", ".join(SPACES))
    _add_device(parser)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m gssf_triton.autotune",
        description="Tune the package's kernels for a machine, and see what runs and why.",
        epilog="GSSF_AUTOTUNE=off|cached|on: the model alone; tables, and the model for the rest (default); tune what "
        "no table has at its first use. GSSF_CACHE_DIR: where results are kept, instead of the user's cache directory.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("tune", tune, "measure configurations and keep the best; stop and go on whenever you like")
    _add_shapes(command)
    command.add_argument(
        "--time-limit", type=positive(float), default=math.inf, metavar="SECONDS",
        help="stop after this long, the first key apart",
    )  # fmt: skip
    command.add_argument("--candidates", type=positive(int), default=24, metavar="N", help="configurations a key (24)")
    command.add_argument("--force", action="store_true", help="tune anew what was tuned before")
    command.add_argument("--dry-run", action="store_true", help="list the keys, tune nothing")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = add("show", show, "what would run for a shape, and why")
    _add_shapes(command)
    command.add_argument("--for", dest="target", metavar="TARGET", help="a GPU that is not here: nvidia-h100, sm_90, …")

    command = add("check", check, "the compile gate over the tables: no GPU is needed")
    command.add_argument("table", nargs="*", type=Path, help="table files (default: those of the package)")
    command.add_argument("--jobs", type=positive(int), default=devices.cores(), help="processes (default: all cores)")
    command.add_argument("--no-compile", action="store_true", help="only whether the tables are legal")
    command.add_argument("--quiet", action="store_true", help="print only what fails")

    command = add("export", export, "your results as a table that can ship with the package")
    _add_device(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="default: DEVICE.json here; - for standard output")
    command.add_argument("--name", help="the table's device name, in place of the device's own")

    _add_device(add("doctor", doctor, "device, versions, backend and cache, for a bug report"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    console.ready()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        console.give_up_output()  # the reader has closed its end
        return 0
    except (UsageError, OSError) as fault:
        parser.exit(2, f"{parser.prog} {args.command}: {fault}\n")
