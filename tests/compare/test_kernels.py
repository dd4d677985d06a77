"""What an update is made of: products and convolutions are counted through loops and branches, dead ones left out."""

import jax
import jax.numpy as jnp
import kernels
import pytest

from srpo_jax.models import convolution

X, KERNEL, SQUARE = jnp.ones((2, 8, 6, 3)), jnp.ones((3, 3, 3, 3)), jnp.ones((5, 5))
CONVOLUTION = 2.0 * 2 * 8 * 6 * 3 * 3 * 3 * 3


def found(function, *arguments):
    return kernels.operations(kernels.live(jax.jit(function).trace(*arguments)))


def by_kind(counted):
    return {
        kind: sum(count for operation, count in counted.items() if operation.kind == kind) for kind in kernels.THEIRS
    }


def test_loops_and_branches():
    def function(square, flag):
        def body(x, _):
            return jax.lax.map(lambda row: row @ square, x), None

        looped = jax.lax.scan(body, square, None, 3)[0]
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ square, looped)

    counted = found(function, SQUARE, True)
    assert by_kind(counted) == {kernels.PRODUCT: 3 * 5 + 2, kernels.CONVOLUTION: 0}
    assert kernels.total(counted) == 3 * 5 * 2 * 25 + 2 * 2 * 125


def test_gradients_that_nobody_reads_are_left_out():
    padding = ((1, 1), (1, 1))

    def loss(x, kernel):
        return convolution.convolve(x, kernel, padding).sum()

    one, both = found(jax.grad(loss), X, KERNEL), found(jax.grad(loss, (0, 1)), X, KERNEL)
    # The result of a sum's gradient needs no forward pass.
    assert by_kind(one)[kernels.CONVOLUTION] == 1 and by_kind(both)[kernels.CONVOLUTION] == 2
    assert kernels.total(one) == CONVOLUTION and kernels.total(both) == 2 * CONVOLUTION


def test_an_operation_alone():
    counted = found(lambda square: square @ square, SQUARE)
    counted += found(lambda x, kernel: convolution.convolve(x, kernel, ((1, 1), (1, 1))), X, KERNEL)
    assert len(counted) == 2 and all(0 < kernels.seconds(operation) < 10 for operation in counted)


def test_the_table():
    rows = {
        kernels.PRODUCT: {"gflop": 10.0, "ours": 0.1, "theirs": 0.2},
        kernels.CONVOLUTION: {"gflop": 30.0, "ours": 0.3, "theirs": 0.15},
        kernels.WHOLE: {"gflop": 40.0, "ours": 0.5, "theirs": 0.6},
    }
    lines = kernels.describe("small", rows).splitlines()
    assert lines[2].split() == ["matrix", "products", "10", "0.100", "100", "0.200", "50"]
    assert lines[-1] == "ours 1.20 times as fast; if products were all it does, 1.50 times"


@pytest.mark.parametrize("flag", ["--sizes=tiny", "--sizes=small,tiny"])
def test_a_size_that_is_unknown(flag):
    with pytest.raises(kernels.errors.UserError, match="must be of small, demo, medium"):
        kernels.main([flag])
