"""Import this before the package: where it is not installed, it is found afterwards all the same."""

from __future__ import annotations

import _layout

_layout.ensure()
