"""The real libraries, importable beside every build of torch."""

from __future__ import annotations

import real_torchvision  # noqa: F401
