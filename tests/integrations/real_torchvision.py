"""torchvision, importable beside every build of torch: import this first."""

from __future__ import annotations

import torch

#: Declared, and kept for the session, where torchvision's own operators do not load.
_operators: torch.library.Library | None = None


def _import_torchvision() -> None:
    """Import torchvision, which timm, open_clip and transformers import for what needs none of its operators.

    Its releases are built against CUDA. Beside a CPU build of torch their operators do not load, and the import fails
    at two operators that it describes to the compiler and that nothing here calls; with their signatures declared it
    goes through.
    """
    global _operators
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return
    _operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


_import_torchvision()
