"""What is refused when a program is built: before weights are read and anything is compiled."""

import pytest
from helpers import tiny
from jax.sharding import AbstractMesh

from srpo_jax import architectures, program, sharding
from srpo_jax.errors import UserError


def test_a_batch_that_the_mesh_does_not_divide(models):
    config = tiny.config(models, data__batch_size=6, optim__accumulation=2)
    with pytest.raises(UserError, match=r"= 3 must be a multiple of the 8 devices"):
        program.build(config, AbstractMesh((2, 4, 1), sharding.AXES), architectures.read(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rollout__cache": 2, "rollout__cache_ends": (1, 3)},
            r"cache_ends=\(1, 3\): this transformer has 1 \+ 2 blocks",
        ),
        ({"data__height": 40}, r"^config\.data\.height=40: must be a positive multiple of 16"),
        ({"data__width": 24}, r"^config\.data\.width=24: must be a positive multiple of 16"),
    ],
)
def test_what_the_family_does_not_have(models, changes, message):
    config = tiny.config(models, **changes)
    with pytest.raises(UserError, match=message):
        program.build(config, sharding.make_mesh(config.mesh), architectures.read(config))
