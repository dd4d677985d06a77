"""The converter as a command: its words, its memory, and its end by a signal."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers import references

from srpo_jax import convert
from srpo_jax.errors import UserError
from srpo_jax.weights import engine, files, folder, formats


def run(*arguments):
    command = [sys.executable, "-m", "srpo_jax.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_errors_are_one_line_and_an_exit_code(model, tmp_path):
    result = run("import", "--source", model / "tokenizer", "--target", tmp_path / "out")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, size", [("10GB", 10**10), ("500mb", 5 * 10**8), ("1.5G", 15 * 10**8), ("77", 77)])
def test_shard_sizes(text, size):
    assert convert._size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3", "0", "10TB"])
def test_shard_sizes_that_are_none(text):
    with pytest.raises(UserError, match=f"^--max-shard-size={text}: must be a size, as 10GB or 500MB"):
        convert.main(["export", "--source", "a", "--target", "b", "--format", "bfl", f"--max-shard-size={text}"])


MEASURED = """
import runpy, sys
source, imported, exported = sys.argv[1:]
for arguments in (
    ["import", "--source", source, "--target", imported],
    ["export", "--source", imported, "--target", exported, "--format", "bfl"],
):
    sys.argv = ["convert", *arguments]
    try:
        runpy.run_module("srpo_jax.convert", run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def peak(*paths):
    """Peak resident memory in bytes of the real commands, in and out; they assert that torch stayed out of it."""
    command = [sys.executable, "-c", MEASURED, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1]) * 1024


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    """A 400 MB transformer of 5 MB tensors, in and out again, takes little more memory than one of 1 MB."""
    sizes = {
        "num_layers": 1,
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "in_channels": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
    }
    form, peaks = formats.find("flux", "diffusers"), {}
    for name, heads, layers in (("small", 1, 1), ("large", 4, 23)):
        config = folder.make_config("flux", sizes | {"num_attention_heads": heads, "num_single_layers": layers}, name)
        shapes = engine.source_shapes(form.table(config), folder.shapes("flux", config))
        specs = {n: files.Spec(shape, np.dtype(np.float32)) for n, shape in shapes.items()}
        source, imported, exported = tmp_path / f"{name}.safetensors", tmp_path / "in" / name, tmp_path / "out" / name
        with files.SafetensorsWriter(source, specs) as out:
            for n, spec in specs.items():
                out.write(n, np.ones(spec.shape, np.float32))
        peaks[name] = peak(source, imported, exported)
        shutil.rmtree(tmp_path / "in")
        shutil.rmtree(tmp_path / "out")
    assert source.stat().st_size > 380e6 and max(spec.nbytes for spec in specs.values()) < 7e6
    print(peaks)
    assert peaks["large"] - peaks["small"] < 60e6


def test_sigterm_leaves_nothing(tmp_path):
    """Killed while writing, the command removes what it had begun."""
    script = f"""
        import os, signal, sys
        from srpo_jax.weights import files
        write = files.SafetensorsWriter.write
        def killed(self, *arguments):
            write(self, *arguments)
            os.kill(os.getpid(), signal.SIGTERM)
        files.SafetensorsWriter.write = killed
        sys.argv = ["convert", "import", "--source", {str(tmp_path / "in")!r}, "--target", {str(tmp_path / "o")!r}]
        import runpy
        runpy.run_module("srpo_jax.convert", run_name="__main__")
    """
    references.clip().save_pretrained(tmp_path / "in")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert os.listdir(tmp_path) == ["in"]
