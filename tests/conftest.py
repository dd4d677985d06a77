"""Settings that hold for every test, made before JAX starts, and the tiny models that many tests read."""

import importlib.util
import os
import tempfile

import pytest
from helpers import xla

# The tests compile hundreds of small programs and run each for milliseconds: code that compiles an order of magnitude
# faster is worth more than code that runs fast. Tests of several devices ask for them in processes of their own.
# Processes of pytest-xdist inherit what the first one found.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = xla.known("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0")
# What one test has compiled, however small, another reads, in another process too. The first process makes the folder,
# and takes it away.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="srpo-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# No test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("torchvision"):
    from helpers import torchvision_operators  # noqa: F401


# Files that take minutes. Two processes share the tests file by file: what is long comes first, so that neither waits
# for the other in the end.
LONG = (
    *("test_distributed.py", "test_transfers.py", "test_evaluate_processes.py", "test_train.py", "test_storage.py"),
    *("test_step.py", "test_nonfinite.py", "test_demo.py", "test_many_devices.py", "test_in_training.py"),
    *("test_golden.py", "test_lora.py", "test_evaluate.py", "test_train_stored.py", "test_doors.py", "test_study.py"),
    *("test_methods_many_devices.py", "test_full_disk.py", "test_damage.py", "test_scores.py", "test_rollouts.py"),
    *("test_workers.py", "test_train_flow.py", "test_space.py", "test_chain.py", "test_autoencoder.py", "test_flux.py"),
)


def pytest_collection_modifyitems(items):
    """Puts the long files first; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


# --- made once, and read by all: who changes a file changes a copy ----------------------------------------------------


def _files(path):
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*")}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of ``tiny.write_all``."""
    from helpers import tiny

    path = tiny.write_all(tmp_path_factory.mktemp("tiny") / "models")
    made = _files(path)
    yield path
    assert _files(path) == made, "a test changed the models that all share"


@pytest.fixture(scope="session")
def model(models):
    """The pipeline's folder among ``models``."""
    return models / "pipeline"


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """(a pipeline as diffusers saves it, the same imported by us)."""
    from helpers import references

    from srpo_jax import convert

    path = tmp_path_factory.mktemp("pipelines")
    references.flux_pipeline(path / "diffusers")
    convert.import_folder(path / "diffusers", path / "ours")
    made = _files(path)
    yield path / "diffusers", path / "ours"
    assert _files(path) == made, "a test changed the pipelines that all share"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder for compiled programs (``config.compilation_cache``): recipes of one shape compile theirs once."""
    return str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="session")
def recipe(models, compiled):
    """A function from changes to a config."""
    from helpers import tiny

    return lambda **changes: tiny.config(models, **{"compilation_cache": compiled, **changes})
