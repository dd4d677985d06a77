"""The machinery under the converter: transforms, rules and the strict engine."""

import jax
import numpy as np
import pytest
from helpers.bits import BF16, DTYPES, random, same

from srpo_jax.errors import UserError
from srpo_jax.weights import engine, transforms
from srpo_jax.weights.rules import Rule, Table

# --- transforms ---

CASES = {
    "identity": (transforms.identity, [(5,), (2, 3)], [(5,), (2, 3)]),
    "linear": (transforms.linear, [(4, 6)], [(6, 4)]),
    "conv": (transforms.conv, [(4, 3, 5, 7)], [(5, 7, 3, 4)]),
    "pointwise": (transforms.pointwise, [(4, 3, 1, 1)], [(3, 4)]),
    "swap then linear": (transforms.swap_halves >> transforms.linear, [(6, 5)], [(5, 6)]),
    "linear_to": (transforms.linear_to(3, 2, 4), [(24, 5)], [(5, 3, 2, 4)]),
    "reshape": (transforms.reshape((6,), (3, 2)), [(6,)], [(3, 2)]),
    "split": (transforms.split(2, 4), [(6, 5)], [(2, 5), (4, 5)]),
    "join": (transforms.join(2, 4), [(2, 5), (4, 5)], [(6, 5)]),
    "qkv_kernel": (transforms.qkv_kernel(2, 4), [(8, 5)] * 3, [(5, 3, 2, 4)]),
    "qkv_bias": (transforms.qkv_bias(2, 4), [(8,)] * 3, [(3, 2, 4)]),
    "fused_qkv_bias": (transforms.fused_qkv_bias(2, 4), [(24,)], [(3, 2, 4)]),
    "fused rows of two parameters": (
        transforms.split(24, 7) >> transforms.each(transforms.linear_to(3, 2, 4), transforms.linear),
        [(31, 5)],
        [(5, 3, 2, 4), (5, 7)],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_transform_is_invertible_to_the_bit(name, dtype):
    transform, given, expected = CASES[name]
    arrays = [random(shape, dtype, seed) for seed, shape in enumerate(given)]
    results = transform.forward(arrays)
    assert [r.shape for r in results] == expected
    assert sum(r.size for r in results) == sum(a.size for a in arrays)
    back = transform.inverse(results)
    assert len(back) == len(arrays) and all(same(a, b) for a, b in zip(arrays, back, strict=True))
    inverted = transform.inverted()
    assert all(same(a, b) for a, b in zip(inverted.forward(results), arrays, strict=True))


def test_transforms_put_numbers_where_torch_means_them():
    q, k, v = (random((8, 5), seed=s) for s in range(3))
    (kernel,) = transforms.qkv_kernel(2, 4).forward([q, k, v])
    # out feature h * 4 + d of k is kernel[:, 1, h, d]
    assert same(kernel[:, 1, 1, 2], k[6])
    (fused,) = transforms.fused_qkv_kernel(2, 4).forward([np.concatenate([q, k, v])])
    assert same(fused, kernel)
    rows = np.arange(6, dtype=np.float32)
    assert transforms.swap_halves.forward([rows])[0].tolist() == [3, 4, 5, 0, 1, 2]
    image = random((2, 3, 4, 5))
    assert same(transforms.conv.forward([image])[0][3, 4, 2, 1], image[1, 2, 3, 4])


def test_split_refuses_other_row_counts():
    with pytest.raises(ValueError, match="7 rows"):
        transforms.split(2, 4).forward([np.zeros((7, 2))])


# --- rules and engine ---

TOY = Table(
    (
        Rule("embedding", "emb.weight", transforms.identity),
        Rule(
            ("blocks.q", "blocks.mlp"),
            "layers.{i}.fused.weight",
            transforms.split(4, 6) >> transforms.each(transforms.linear, transforms.linear),
            layers=3,
        ),
        Rule("blocks.kv", ("layers.{i}.k", "layers.{i}.v"), transforms.join(4, 4), layers=3),
    ),
    ignored=frozenset({"emb.position_ids"}),
    aliases={"tied.weight": "emb.weight"},
)
SHAPES = {"embedding": (7, 5), "blocks.q": (3, 5, 4), "blocks.mlp": (3, 5, 6), "blocks.kv": (3, 8)}
LIKE = {
    "embedding": np.zeros((7, 5)),
    "blocks": {"q": np.zeros((3, 5, 4)), "mlp": np.zeros((3, 5, 6)), "kv": np.zeros((3, 8))},
}


def toy_tensors(dtype=np.float32):
    shapes = {"emb.weight": (7, 5)}
    for i in range(3):
        shapes |= {f"layers.{i}.fused.weight": (10, 5), f"layers.{i}.k": (4,), f"layers.{i}.v": (4,)}
    return {name: random(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engine_round_trip(dtype):
    tensors = toy_tensors(dtype)
    params = engine.to_params(TOY, tensors, LIKE)
    assert {path: a.shape for path, a in engine.flatten(params).items()} == SHAPES
    assert same(params["blocks"]["mlp"][2], tensors["layers.2.fused.weight"][4:].T)
    back = engine.from_params(TOY, params)
    assert back.keys() == tensors.keys() and all(same(back[name], tensors[name]) for name in tensors)


def test_source_shapes_are_those_of_the_tensors():
    assert engine.source_shapes(TOY, SHAPES) == {name: a.shape for name, a in toy_tensors().items()}


def faults(tensors):
    with pytest.raises(UserError) as caught:
        engine.to_params(TOY, tensors, LIKE, "toy")
    message = str(caught.value)
    assert "\n" not in message and "toy network" in message
    return message


def test_missing_unused_and_mismatching_tensors_are_listed_in_one_message():
    tensors = toy_tensors()
    del tensors["layers.1.k"], tensors["layers.2.v"]
    tensors["surprise"] = np.zeros(3, np.float32)
    tensors["layers.0.fused.weight"] = np.zeros((10, 6), np.float32)
    message = faults(tensors)
    assert "2 missing: layers.1.k, layers.2.v" in message
    assert "1 not used: surprise" in message
    assert "1 wrong shape: layers.0.fused.weight [10, 6] instead of [10, 5]" in message


def test_right_size_of_wrong_shape_is_refused():
    tensors = toy_tensors()
    tensors["emb.weight"] = tensors["emb.weight"].T.copy()
    assert "emb.weight [5, 7] instead of [7, 5]" in faults(tensors)


def test_integers_are_refused():
    tensors = toy_tensors()
    tensors["emb.weight"] = np.zeros((7, 5), np.int8)
    assert "1 not of floating point: emb.weight (int8)" in faults(tensors)


def test_long_lists_are_cut():
    assert "and 94 more" in faults(toy_tensors() | {f"extra{i}": np.zeros(1) for i in range(100)})


def test_only_extra_tensors_that_the_table_names_are_skipped():
    expected = engine.to_params(TOY, toy_tensors(), LIKE)
    given = engine.to_params(TOY, toy_tensors() | {"emb.position_ids": np.arange(3)}, LIKE)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True))
    assert "1 not used: layers.0.position_ids" in faults(toy_tensors() | {"layers.0.position_ids": np.arange(3)})


def test_tied_tensors():
    tensors = toy_tensors()
    expected = engine.to_params(TOY, tensors, LIKE)
    both = tensors | {"tied.weight": tensors["emb.weight"].copy()}
    alone = {name: a for name, a in both.items() if name != "emb.weight"}
    for given in (both, alone):
        assert same(engine.to_params(TOY, given, LIKE)["embedding"], expected["embedding"])
    both["tied.weight"] = random((7, 5), seed=99)
    assert "1 tied but different: tied.weight and emb.weight" in faults(both)


def test_mixed_dtypes_are_kept_without_loss():
    tensors = toy_tensors() | {"layers.1.k": random((4,), BF16)}
    params = engine.to_params(TOY, tensors, LIKE)
    assert params["blocks"]["kv"].dtype == np.float32
    assert same(params["blocks"]["kv"][1, :4], tensors["layers.1.k"].astype(np.float32))


def test_stacks_are_made_once_when_layers_are_written():
    params = engine.to_params(TOY, toy_tensors(), LIKE)
    made = []

    class Stored:
        """An array that is elsewhere until numpy asks for it, as in a checkpoint."""

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            made.append(self)
            return self.array

    found = engine.from_params(TOY, jax.tree.map(Stored, params))
    assert all(same(found[name], array) for name, array in toy_tensors().items())
    assert len(made) == len(set(made)) == len(SHAPES)


def test_tables_with_faults_of_their_own_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Table((Rule("a", "x", transforms.identity), Rule("b", "x", transforms.identity)))
    with pytest.raises(ValueError, match="disagree"):
        Rule("a", "x.{i}", transforms.identity)
    with pytest.raises(ValueError, match="disagree"):
        Rule("a", "x", transforms.identity, layers=2)
    with pytest.raises(ValueError, match="extra"):
        engine.source_shapes(TOY, SHAPES | {"extra": (2,)})
    with pytest.raises(ValueError, match="stack of 3 layers"):
        engine.source_shapes(TOY, SHAPES | {"blocks.kv": (4, 8)})
