"""SGP-HPS by hand."""

import math

import numpy as np
import pytest

from srpo_jax.evaluation import sgp


def test_three_figures():
    photo, render = [0.30, 0.28, 0.25, 0.27], [0.29, 0.30, 0.25, 0.20]
    found = sgp.sgp(np.array(photo, np.float32), np.array(render, np.float32))
    differences = [0.01, -0.02, 0, 0.07]
    np.testing.assert_allclose(found.difference, differences, atol=1e-7)
    assert found.win.tolist() == [1, 0, 0.5, 1]
    np.testing.assert_allclose(found.sigmoid, [1 / (1 + math.exp(-100 * d)) for d in differences], atol=1e-6)
    assert found.win.mean() == 0.625
    assert sgp.sgp([50.0, -50.0], [0.0, 0.0]).sigmoid.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        sgp.sgp([0.1, 0.2], [0.1])


def test_captions():
    assert sgp.captions(["a fox"]) == (["Realistic photo a fox"], ["CG Render a fox"])
