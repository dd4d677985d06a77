"""Settings that hold for every test, made before JAX starts."""

import importlib.util
import os

# The tests compile hundreds of small programs and run each for milliseconds: code that compiles an order of magnitude
# faster is worth more than code that runs fast. Tests of several devices ask for them in processes of their own.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")
# No test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _declare_torchvision_operators() -> None:
    """Makes torchvision importable beside a CPU build of torch.

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
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(operators)  # torch forgets the schemas when the object goes
        import torchvision  # noqa: F401


_KEPT: list = []
if importlib.util.find_spec("torchvision"):
    _declare_torchvision_operators()
