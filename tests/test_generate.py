"""Images: the real FluxPipeline's, from the same files, prompts and latents; and the command's other ways."""

import json
import types

import diffusers
import jax
import numpy as np
import optax
import pytest
from helpers import references, tiny
from PIL import Image

from srpo_jax import checkpoint, generate, sampling, sharding, storage, train
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError
from srpo_jax.families.flux import read_scheduler
from srpo_jax.weights import folder

PROMPTS = ["a red bird", "the big house, not drawn"]
DYNAMIC = {"base_image_seq_len": 4, "max_image_seq_len": 16, "base_shift": 0.5, "max_shift": 1.15}


@pytest.fixture
def pair(pipelines, tmp_path):
    """(diffusers' pipeline, our folder), whose schedules a test may change."""
    pipeline = diffusers.FluxPipeline.from_pretrained(pipelines[0])
    pipeline.set_progress_bar_config(disable=True)
    ours = tmp_path / "ours"
    ours.mkdir()
    for part in pipelines[1].iterdir():
        (ours / part.name).symlink_to(part)
    (ours / "scheduler").unlink()
    return pipeline, ours


def pictures(paths):
    return np.stack([np.asarray(Image.open(path), np.int32) for path in paths])


@pytest.mark.parametrize(
    ("height", "width", "dynamic"), [(32, 48, True), (64, 32, False)], ids=["dynamic shift", "fixed shift"]
)
def test_the_pictures_are_those_of_diffusers(pair, tmp_path, height, width, dynamic):
    pipeline, ours = pair
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=dynamic, **(DYNAMIC if dynamic else {})
    )
    pipeline.scheduler.save_pretrained(ours / "scheduler")
    latents = np.random.default_rng(0).normal(size=(2, height * width // 256, 64)).astype(np.float32)
    expected = pipeline(
        PROMPTS, height=height, width=width, num_inference_steps=5, guidance_scale=3.5, output_type="pil",
        latents=references.torch.tensor(latents), max_sequence_length=references.TEXT_LENGTH,
    ).images  # fmt: skip
    expected = np.stack([np.asarray(image, np.int32) for image in expected])
    np.savez(tmp_path / "latents.npz", latents=latents)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    generate.main([
        f"--model={ours}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'out'}", f"--height={height}",
        f"--width={width}", "--steps=5", "--guidance=3.5", f"--latents={tmp_path / 'latents.npz'}",
    ])  # fmt: skip
    found = pictures(sorted((tmp_path / "out").iterdir()))
    assert found.shape == expected.shape == (2, height, width, 3)
    assert expected.std() > 5 and np.abs(expected[0] - expected[1]).mean() > 1  # something to see, not twice the same
    assert np.abs(found - expected).max() <= 1


# --- other ways -------------------------------------------------------------------------------------------------------

SIZE = dict(height=32, width=32, steps=2, guidance=3.5)
WORDS = ["--height=32", "--width=32", "--steps=2"]


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    """A run whose checkpoint holds other weights, and an average that is the pipeline's own."""
    path = tmp_path_factory.mktemp("run")
    _, _, params = folder.load(model / "transformer", "flux")
    moved = jax.tree.map(lambda x: x * 1.1, params)
    checkpoints = checkpoint.Checkpoints(path, keep=1)
    checkpoints.save(3, TrainState(jax.device_put(np.int32(3)), moved, optax.sgd(1.0).init(params), params), {})
    checkpoints.close()
    return path


def test_an_image_depends_on_its_number_and_seed_alone(model, tmp_path):
    def make(name, prompts, **options):
        return pictures(generate.generate(model, prompts, tmp_path / name, **SIZE | options))

    together = make("together", ["red apple"] * 3, batch_size=2)
    one = make("one", ["red apple"], batch_size=1)
    assert np.abs(together[0] - one[0]).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 1 and np.abs(together[1] - together[2]).mean() > 1
    assert np.abs(make("seed", ["red apple"], batch_size=1, seed=1) - one).mean() > 1


def test_weights_of_a_checkpoint(model, workdir, tmp_path):
    names = {"own": [], "trained": [f"--checkpoint={workdir}"], "average": [f"--checkpoint={workdir}", "--ema"]}
    for name, words in names.items():
        generate.main([f"--model={model}", "--prompt=red apple", f"--out={tmp_path / name}", *WORDS, *words])
    own, trained, average = (pictures((tmp_path / name).iterdir()) for name in names)
    assert np.abs(own - trained).mean() > 0.1
    np.testing.assert_array_equal(own, average)


def test_files_are_named_by_number_and_prompt(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("red apple, blue car!\n../..\n")
    generate.main([f"--model={model}", f"--prompts={tmp_path / 'p.txt'}", f"--out={tmp_path / 'out'}", *WORDS])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-red-apple-blue-car.png", "0001-image.png"]
    assert "2 images" in capsys.readouterr().out


def test_a_column_of_the_prompts(model, tmp_path):
    (tmp_path / "p.csv").write_text("en,de\nred apple,roter Apfel\n")
    words = [f"--model={model}", f"--prompts={tmp_path / 'p.csv'}", f"--out={tmp_path / 'out'}", *WORDS]
    with pytest.raises(UserError, match="name the column of the prompts by --column=NAME .*; there are 'en', 'de'"):
        generate.main(words)
    generate.main([*words, "--column=de"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000-roter-Apfel.png"]


def test_weights_that_are_no_numbers_make_no_black_pictures(model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in model.iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "vae").unlink()
    config, _, params = folder.load(model / "vae", "autoencoder")
    folder.save(broken / "vae", "autoencoder", config, jax.tree.map(lambda leaf: leaf * np.float32("nan"), params))
    with pytest.raises(sampling.NotFinite, match="1 of 1 pictures are not finite numbers and would be black"):
        generate.main([f"--model={broken}", "--prompt=a", f"--out={tmp_path / 'out'}", *WORDS])
    assert not (tmp_path / "out").exists()


def test_training_goes_on_without_samples_that_are_no_numbers(tmp_path, capsys):
    def paint(*_):
        raise sampling.NotFinite("2 of 2 pictures are not finite numbers")
        yield

    samples = train.SampleGrid.__new__(train.SampleGrid)
    samples._painter, samples._chunks = types.SimpleNamespace(paint=paint), []
    samples._folder = storage.path(tmp_path / "samples")
    state = types.SimpleNamespace(params={"a": 1}, ema=None)
    samples.draw(3, state, types.SimpleNamespace(base=None, autoencoder=None))
    assert "no samples of update 3: 2 of 2 pictures are not finite" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--column=de"], "--column=de is of --prompts; leave it out"),
        (["--height=40"], "--height=40: must be a positive multiple of 16"),
        (["--steps=0"], "--steps=0"),
        (["--ema"], "--step and --ema choose from a --checkpoint"),
        (["--checkpoint=none"], "none is not a folder"),
        (["--latents=none.npz"], "--latents=none.npz"),
        (["--fsdp=3"], "needs 3 devices"),
        (["--model=none"], "none/transformer is not a folder"),
    ],
)
def test_bad_input_leaves_nothing(model, tmp_path, words, message):
    with pytest.raises(UserError, match=message) as error:
        generate.main([f"--model={model}", "--prompt=a", f"--out={tmp_path / 'out'}", *WORDS, *words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_latents_of_another_size(model, tmp_path):
    np.savez(tmp_path / "l.npz", latents=np.zeros((1, 9, 64), np.float32))
    with pytest.raises(UserError, match=r"shape \(1, 9, 64\); 1 prompts at 32x32 need \(1, 4, 64\)"):
        generate.main([f"--model={model}", "--prompt=a", "--out=out", *WORDS, f"--latents={tmp_path / 'l.npz'}"])


def test_a_checkpoint_of_another_transformer(model, tmp_path):
    params = {"img_in": {"kernel": np.zeros((2, 2), np.float32)}}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, TrainState(jax.device_put(np.int32(1)), params, (), None).replace(opt_state=params), {})
    checkpoints.close()
    with pytest.raises(UserError, match="the checkpoint is not of .*transformer: .* parameters differ"):
        generate.main([f"--model={model}", "--prompt=a", "--out=out", *WORDS, f"--checkpoint={tmp_path}"])


@pytest.mark.parametrize(
    "change", [{"_class_name": "DDIMScheduler"}, {"use_karras_sigmas": True}, {"time_shift_type": "linear"}]
)
def test_other_schedules_are_refused(tmp_path, change):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny.SCHEDULER | change))
    with pytest.raises(UserError, match="is not supported; FLUX.1 has"):
        read_scheduler(tmp_path)


def test_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sheet = np.asarray(sampling.grid(images))
    assert sheet.shape == (4, 9, 3)
    assert (sheet[::2, ::3, 0] == [[0, 1, 2], [3, 4, 255]]).all()


def test_the_attention_backend_is_of_the_transformer_alone():
    """Beside it, in `evaluate` too, heads and biases are of kinds that not every backend takes."""
    mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    for asked, chosen in (("cudnn", "cudnn"), ("auto", "xla")):
        compute, frozen = sampling.computes(mesh, "float32", asked)
        assert (compute.attention, frozen.attention) == (chosen, "xla")
        assert compute.dtype == frozen.param_dtype == np.float32
