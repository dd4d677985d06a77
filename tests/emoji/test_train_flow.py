"""The small world's flow training, at a size that trains nothing: what is drawn, what is learnt, and what comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import tiny

from srpo_jax.emoji import flow_data, flow_networks, flow_results, train_flow, world

CONCEPTS = len(world.world())


@pytest.fixture(scope="module", autouse=True)
def small():
    """A transformer of 32 channels."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32}
        flux = dataclasses.replace(flow_networks.FLUX, **sizes, pooled_projection_dim=32)
        patch.setattr(flow_networks, "FLUX", flux)
        patch.setattr(flow_networks, "TEXT_WIDTH", 32)
        yield


@pytest.fixture(scope="module")
def networks():
    """(networks, parameters) with random last layers, so that velocities are not 0."""
    networks, params = flow_networks.make_flow_networks(60, 50, 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    return networks, params


@pytest.fixture(scope="module")
def data():
    """Random latents and captions."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = 4 * CONCEPTS + 1
    return flow_data.FlowData(
        tokens=jax.random.normal(keys[0], (3 * CONCEPTS, 16, 64)),
        t5_ids=jax.random.randint(keys[1], (rows, 16), 0, 50),
        clip_ids=jax.random.randint(keys[2], (rows, 16), 0, 60),
    )


def test_captions_are_in_the_order_of_the_data():
    texts = flow_data.captions()
    assert len(texts) == 4 * CONCEPTS + 1 and texts[-1] == ""
    caption = world.world()[5].caption
    kinds = [texts[kind * CONCEPTS + 5] for kind in range(4)]
    assert kinds == [f"3D. {caption}", f"Flat. {caption}", f"Mono. {caption}", caption]


def test_draw_pairs_pictures_with_their_captions(data):
    caption, sigma, noisy, velocity = flow_data.draw_batch(data, jax.random.key(1), 4000)
    caption = np.asarray(caption)
    clean = np.asarray(noisy - flow_level(sigma) * velocity)  # x0 = x - sigma * (eps - x0)
    nearest = np.asarray(jnp.argmin(pairwise(clean[:300, 0], data.tokens[:, 0]), axis=1))
    styled = caption[:300] < data.pictures
    np.testing.assert_array_equal(nearest[styled], caption[:300][styled])
    bare = (caption[:300] >= data.pictures) & (caption[:300] < data.empty)
    np.testing.assert_array_equal(nearest[bare] % CONCEPTS, caption[:300][bare] - data.pictures)
    assert abs(np.mean(caption == data.empty) - flow_data.EMPTY) < 0.02
    assert abs(np.mean((caption >= data.pictures) & (caption < data.empty)) - flow_data.BARE) < 0.03
    assert 0.5 < float(sigma.mean()) < 0.65


def flow_level(sigma):
    return sigma[:, None, None]


def pairwise(a, b):
    return jnp.sum(jnp.square(a[:, None] - b[None]), -1)


def test_fresh_networks_predict_nothing_and_do_not_hear_guidance(data):
    networks, params = flow_networks.make_flow_networks(60, 50, 0)
    encoded = networks.encode(params, data.t5_ids[:2], data.clip_ids[:2])
    velocity = networks.velocity(params, data.tokens[:2], jnp.full(2, 0.5), jnp.array([1.0, 4.0]), encoded)
    assert not velocity.any()
    assert not params["transformer"]["guidance_in"]["out_layer"]["kernel"].any()


def test_student_at_guidance_one_learns_the_teacher_itself(networks, data, monkeypatch):
    """A student that is the teacher has no loss at guidance 1, and one that grows as guidance does."""
    networks, params = networks
    silent = params["transformer"]["guidance_in"]["out_layer"]
    params["transformer"]["guidance_in"]["out_layer"] = jax.tree.map(jnp.zeros_like, silent)
    encoded = networks.encode(params, data.t5_ids, data.clip_ids)
    teacher = train_flow.Teacher(data, params, encoded)
    student = {"transformer": params["transformer"]}
    losses = []
    for guidance in (1.0, 2.0, 3.0):
        monkeypatch.setattr(train_flow, "GUIDANCE", (guidance, guidance))
        monkeypatch.setattr(train_flow, "FAVOURED", (guidance,))
        losses.append(float(train_flow.student_loss(networks, 8, student, teacher, jax.random.key(2))[0]))
    assert losses[0] < 1e-9
    assert losses[2] == pytest.approx(4 * losses[1], rel=1e-4)  # squares of 1 and 2 times the difference


def test_a_whole_run_resumes_and_exports_a_pipeline(tmp_path, monkeypatch, capsys):
    tiny.save_random(tmp_path / "vae", "autoencoder", tiny.VAE, 2)
    monkeypatch.setattr(flow_results, "SHOWN", flow_results.SHOWN[:1])
    flags = [f"--workdir={tmp_path / 'run'}", f"--vae={tmp_path / 'vae'}", "--batch=2", "--distil-steps=1"]
    train_flow.main([*flags, "--steps=2"])
    for name in ("teacher.png", "student.png", "pipeline/model_index.json", "pipeline/transformer/config.json"):
        assert (tmp_path / "run" / name).exists(), name

    capsys.readouterr()
    train_flow.main([*flags, "--steps=3"])
    told = capsys.readouterr().out
    assert "teacher: resumed at step 2" in told and "student: resumed at step 1" in told

    # diffusers' own default is float32 and that of transformers the file's bfloat16, so one has to be named.
    pipeline = FluxPipeline.from_pretrained(tmp_path / "run" / "pipeline", torch_dtype=torch.float32)
    images = pipeline(
        ["3D. red apple"], height=64, width=64, num_inference_steps=1, max_sequence_length=16, output_type="np"
    ).images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
