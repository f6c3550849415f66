"""Write the model's choices into the tables that ship: `python -m gssf_triton.autotune.model_tables`.

To be run after a change of the model, which a test asks for. Entries that were measured stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gssf_triton.autotune import model, tables
from gssf_triton.autotune.keys import Key
from gssf_triton.autotune.shapes import GPU_KERNELS, SETS, keys_for
from gssf_triton.autotune.tables import Entry, Table, render
from gssf_triton.autotune.targets import SHIPPED_DEVICES


def model_table(
    slug: str, arch: str, names: tuple[str, ...], keys: Iterable[Key], measured: Mapping[Key, Entry]
) -> Table:
    """The model's choices for these keys, marked as such and with no time, under what was measured."""
    chosen = {key: Entry(model.default(key, arch), "model") for key in keys}
    return Table(slug, arch, names, {}, {**chosen, **measured})


def main() -> None:
    """Write every table."""
    for slug, arch, names in SHIPPED_DEVICES:
        path = tables.SHIPPED / f"{slug}.json"
        measured = tables.parse_measured(path.read_text(encoding="utf-8")).entries if path.exists() else {}
        table = model_table(slug, arch, names, keys_for(SETS["full"], GPU_KERNELS), measured)
        path.write_text(render(table), encoding="utf-8")
        print(f"{slug}: {len(table.entries)} entries, {len(measured)} of them measured")


if __name__ == "__main__":
    main()
