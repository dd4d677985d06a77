"""Commands on the workers of a slice: together, and on one of them alone."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import children, tiny
from PIL import Image

from srpo_jax import checkpoint, generate
from srpo_jax.algorithm.step import TrainState
from srpo_jax.weights import folder

ROOT = pathlib.Path(generate.__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(pipeline folder, workdir of a run that moved its transformer)."""
    path = tmp_path_factory.mktemp("trained")
    pipeline = tiny.write_pipeline(path / "pipeline")
    params = jax.tree.map(lambda leaf: leaf * 0.9, folder.load(pipeline / "transformer", "flux")[2])
    checkpoints = checkpoint.Checkpoints(path / "run", keep=1)
    checkpoints.save(1, TrainState(jax.device_put(np.int32(1)), params, {"count": jax.device_put(np.int32(1))}), {})
    checkpoints.close()
    return pipeline, path / "run"


def test_two_processes_generate_what_one_does(trained, tmp_path):
    pipeline, workdir = trained
    (tmp_path / "prompts.txt").write_text("a red apple\nthe blue car\na green tree\n")
    words = [
        f"--model={pipeline}", f"--checkpoint={workdir}", f"--prompts={tmp_path / 'prompts.txt'}", "--height=32",
        "--width=48", "--steps=2",
    ]  # fmt: skip
    place = [f"--coordinator=127.0.0.1:{children.free_port()}", "--process-count=2"]
    command = [sys.executable, "-m", "srpo_jax.generate", *words, *place]
    pair = [[*command, f"--process-id={process}", f"--out={tmp_path / f'two{process}'}"] for process in (0, 1)]
    told = children.together(pair, timeout=300)
    assert [code for code, *_ in told] == [0, 0], told
    assert "3 images in" in told[0][1] and "images" not in told[1][1]
    assert not (tmp_path / "two1").exists()
    generate.main([*words, f"--out={tmp_path / 'one'}"])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 3 and names == sorted(path.name for path in (tmp_path / "two0").iterdir())
    for name in names:
        one, two = (np.asarray(Image.open(tmp_path / run / name), int) for run in ("one", "two0"))
        assert one.std() > 5 and np.abs(one - two).mean() < 0.5


def test_export_of_a_checkpoint_leaves_the_chips_alone(trained, tmp_path):
    """On a worker of a slice JAX's wish for chips waits for the other workers; here, it fails: there are none."""
    pipeline, workdir = trained
    command = [sys.executable, "-m", "srpo_jax.convert", "export", f"--source={pipeline}", f"--checkpoint={workdir}"]
    child = subprocess.run(
        [*command, f"--target={tmp_path / 'out'}", "--format=diffusers"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
