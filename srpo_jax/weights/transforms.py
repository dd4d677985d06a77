"""The rearrangements that the conversion tables are made of.

Torch stores a linear layer as [out, in] and a convolution as [out, in, height, width]; ours are [in, out] and
[height, width, in, out], and a linear layer onto heads is [in, ..., heads, head_dim]. Build longer ones from these with
``>>`` and ``each``:

    qkv_kernel(heads, dim)                                    three torch weights -> one [in, 3, heads, dim]
    each(linear, linear, linear)                              three torch weights -> three kernels
    split(d, d, d) >> each(linear, linear, linear)            one fused torch weight -> three kernels
    split(3 * d, 4 * d) >> each(linear_to(3, heads, dim), linear)   one fused torch weight -> qkv kernel and MLP kernel
"""

from collections.abc import Callable

import numpy as np

from srpo_jax.weights.rules import Transform


def _elementwise(forward: Callable[[np.ndarray], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]) -> Transform:
    """Applies the same rearrangement to every array of the list."""
    return Transform(lambda arrays: [forward(a) for a in arrays], lambda arrays: [inverse(a) for a in arrays])


# Arrays as they are: norm scales, biases, embeddings, and matrices that torch keeps as [in, out] parameters.
identity = _elementwise(lambda a: a, lambda a: a)

# Torch Linear [out, in] <-> kernel [in, out].
linear = _elementwise(lambda a: a.T, lambda a: a.T)

# Torch Conv2d [out, in, height, width] <-> kernel [height, width, in, out].
conv = _elementwise(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))

# Torch 1x1 Conv2d [out, in, 1, 1] <-> linear kernel [in, out].
pointwise = _elementwise(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])


def _exchange_halves(a: np.ndarray) -> np.ndarray:
    half = a.shape[0] // 2
    return np.concatenate([a[half:], a[:half]])


# Exchanges the first and the second half of the rows, as between the (scale, shift) and (shift, scale) orders.
swap_halves = _elementwise(_exchange_halves, _exchange_halves)


def linear_to(*shape: int) -> Transform:
    """Torch Linear [prod(shape), in] <-> kernel [in, *shape], as for heads: ``linear_to(3, heads, head_dim)``."""
    return _elementwise(lambda a: a.T.reshape(a.shape[1], *shape), lambda a: a.reshape(a.shape[0], -1).T)


def reshape(source: tuple[int, ...], target: tuple[int, ...]) -> Transform:
    """The same elements in the same order under another shape: a bias [3 * d] <-> [3, heads, head_dim]."""
    return _elementwise(lambda a: a.reshape(target), lambda a: a.reshape(source))


def split(*sizes: int) -> Transform:
    """One array <-> several, cut along the first axis into the given numbers of rows."""
    borders = list(np.cumsum(sizes)[:-1])

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        (whole,) = arrays
        if whole.shape[0] != sum(sizes):
            raise ValueError(f"{whole.shape[0]} rows cannot be cut into {sizes}")
        return np.split(whole, borders)

    return Transform(forward, lambda arrays: [np.concatenate(arrays)])


def join(*sizes: int) -> Transform:
    """Several arrays with the given numbers of rows <-> one array of all rows: the inverse of ``split``."""
    return split(*sizes).inverted()


def each(*transforms: Transform) -> Transform:
    """Several arrays, each by its own one-to-one transform."""

    def apply(functions: list[Callable], arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [result for function, array in zip(functions, arrays, strict=True) for result in function([array])]

    return Transform(
        lambda arrays: apply([t.forward for t in transforms], arrays),
        lambda arrays: apply([t.inverse for t in transforms], arrays),
    )


def qkv_kernel(heads: int, head_dim: int) -> Transform:
    """Torch q, k and v weights, three of [heads * head_dim, in] <-> one kernel [in, 3, heads, head_dim]."""
    return join(*[heads * head_dim] * 3) >> linear_to(3, heads, head_dim)


def qkv_bias(heads: int, head_dim: int) -> Transform:
    """Torch q, k and v biases, three of [heads * head_dim] <-> one bias [3, heads, head_dim]."""
    return join(*[heads * head_dim] * 3) >> reshape((3 * heads * head_dim,), (3, heads, head_dim))


def fused_qkv_kernel(heads: int, head_dim: int) -> Transform:
    """Torch weight [3 * heads * head_dim, in], rows in the order q, k, v <-> one kernel [in, 3, heads, head_dim]."""
    return linear_to(3, heads, head_dim)


def fused_qkv_bias(heads: int, head_dim: int) -> Transform:
    """Torch bias [3 * heads * head_dim], in the order q, k, v <-> one bias [3, heads, head_dim]."""
    return reshape((3 * heads * head_dim,), (3, heads, head_dim))
