"""Comparing our networks with torch's: outputs, and gradients by every input and parameter."""

import jax
import numpy as np
import torch

from srpo_jax.weights import engine

TOLERANCE = 1e-5  # relative, float32
# Softmax does not see a key's bias: its gradient is rounding alone, and is compared with a typical gradient's norm.
WITHOUT_GRADIENT = ("attn.k.bias", "attention.k.bias")


def perturb(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Moves all parameters off their initial values, so that none is 0 or 1 and every one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def relative_error(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms over the whole arrays, which must have the same shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_same_gradients(ours, model: torch.nn.Module, table, unused: tuple[str, ...] = ()) -> None:
    """Compares a tree of our gradients with those that ``backward`` left in a torch model, by the conversion table.

    Args:
      ours: nested gradients of our parameters.
      model: after ``backward``.
      table: of the model's state dict.
      unused: names of the model's parameters that have no counterpart.
    """
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if name not in unused}
    theirs = engine.flatten(engine.to_params(table, grads, ours))
    typical = np.sqrt(np.mean([np.sum(np.square(leaf, dtype=np.float64)) for leaf in theirs.values()]))
    for name, leaf in engine.flatten(ours).items():
        error = np.linalg.norm(np.asarray(leaf, np.float64) - theirs[name])
        scale = typical if name.endswith(WITHOUT_GRADIENT) else np.linalg.norm(theirs[name])
        assert error < TOLERANCE * scale, (name, error / scale)


def assert_exact_round_trip(table, tensors: dict[str, np.ndarray], like) -> None:
    """Import and export give back every tensor bit for bit, in float32 and in bfloat16."""
    for dtype in (np.float32, jax.numpy.bfloat16):
        cast = {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()}
        back = engine.from_params(table, engine.to_params(table, cast, like))
        assert back.keys() == cast.keys()
        for name, tensor in cast.items():
            assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name
