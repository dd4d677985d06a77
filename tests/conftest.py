"""Settings that hold for every test, made before JAX starts."""

import os

# The tests compile hundreds of small programs and run each for milliseconds: code that compiles an order of magnitude
# faster is worth more than code that runs fast. Tests of several devices ask for them in processes of their own.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")
# No test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402  (transformers reads the variables above when it is imported)


@pytest.fixture(scope="session")
def open_clip():
    """The open_clip package, whose import needs torchvision's.

    PyPI's torchvision is compiled against the CUDA build of torch. Beside a CPU build its library of operators does not load,
    and its import stops at the first of two whose schemas it expects from there. No test calls them: declaring them is enough.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        operators = torch.library.Library("torchvision", "FRAGMENT")  # torch keeps it for as long as the process lives
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip

    return open_clip
