"""Importing this makes torchvision importable beside a CPU build of torch.

open_clip needs it, and transformers and diffusers import it wherever it is installed. PyPI's torchvision is built
against torch for CUDA. Beside a CPU build its operators do not load, and its import stops at two whose schemas it
expects from there. No test calls them: declaring them is enough.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    KEPT = torch.library.Library("torchvision", "FRAGMENT")  # torch forgets the schemas when the object goes
    for name in ("nms", "qnms"):
        KEPT.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
