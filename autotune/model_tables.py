"""Write the model's choices into the tables that ship: `python -m gssf_triton.autotune.model_tables`.

To be run after a change of the model, which a test asks for. Entries that were measured stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

from gssf_triton import console
from gssf_triton.autotune import model, tables
from gssf_triton.autotune.keys import Key
from gssf_triton.autotune.shapes import GPU_KERNELS, SETS, keys_for
from gssf_triton.autotune.tables import Entry, Table, render
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.kernels.targets import SHIPPED_DEVICES
from gssf_triton.storage import read_text, replacing


def model_table(
    slug: str, arch: str, names: tuple[str, ...], keys: Iterable[Key], measured: Mapping[Key, Entry]
) -> Table:
    """The model's choices for these keys, marked as such and with no time, under what was measured."""
    chosen = {key: Entry(model.default(key, arch), "model") for key in keys}
    return Table(slug, arch, names, {}, {**chosen, **measured})


def main(argv: Sequence[str] | None = None) -> int:
    """Write every table."""
    console.ready()
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="gssf_triton.autotune.model_tables", description=description)
    parser.parse_args(argv)
    try:
        for slug, *_ in SHIPPED_DEVICES:
            check_output("the tables", tables.SHIPPED / f"{slug}.json")
    except UsageError as fault:
        parser.error(str(fault))
    for slug, arch, names in SHIPPED_DEVICES:
        path = tables.SHIPPED / f"{slug}.json"
        measured = tables.parse_measured(read_text(path)).entries if path.exists() else {}
        table = model_table(slug, arch, names, keys_for(SETS["full"], GPU_KERNELS), measured)
        with replacing(path) as file:
            file.write(render(table).encode())
        print(f"{slug}: {len(table.entries)} entries, {len(measured)} of them measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
