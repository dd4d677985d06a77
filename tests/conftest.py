"""Settings that hold for every test, made before JAX starts, and what tests of several files share."""

import importlib.util
import os

from helpers import xla

# The tests compile hundreds of small programs and run each for milliseconds: code that compiles an order of magnitude
# faster is worth more than code that runs fast. Tests of several devices ask for them in processes of their own.
# Processes of pytest-xdist inherit what the first one found.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = xla.known("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0")
# No test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("torchvision"):
    from helpers import torchvision_operators  # noqa: F401
