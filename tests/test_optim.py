"""The optimiser against PyTorch's, and the warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from srpo_jax import optim
from srpo_jax.config import default


def test_adamw_with_clip_is_torchs():
    """Ten updates of two parameters; gradients above and below the clip."""
    settings = default().optim
    settings.learning_rate, settings.weight_decay = 1e-2, 1e-1
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    grads = [
        jax.tree.map(lambda x, s=scale: (s * rng.normal(size=x.shape)).astype(np.float32), start)
        for scale in (1.0, 1e-3) * 5
    ]
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-1)
    optimizer = optim.make_optimizer(settings)
    params, state = start, optimizer.init(start)
    for grad in grads:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), settings.clip_norm)
        reference.step()
        updates, state = optimizer.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, value in params.items():
        assert np.abs(value - start[name]).max() > 1e-2
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_warm_up_rises_from_the_first_update():
    settings = default().optim
    settings.learning_rate, settings.warmup_steps = 8.0, 4
    rate = optim.learning_rate(settings)
    np.testing.assert_allclose([rate(i) for i in range(6)], [2, 4, 6, 8, 8, 8])
    settings.warmup_steps = 1
    assert optim.learning_rate(settings)(0) == 8.0
    settings.warmup_steps = 0
    assert optim.learning_rate(settings)(0) == 8.0
