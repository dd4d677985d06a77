"""Every number of a configuration has a range, which its ends belong to."""

import numpy as np
import pytest

from srpo_jax import config, ranges
from srpo_jax.errors import UserError


def numbers():
    for key, value in config.leaves(config.default()):
        one = next(iter(value), None) if isinstance(value, tuple) else value
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield key, value


def test_every_number_has_a_range_and_no_other_key():
    plain = {key for key, _ in numbers() if config.reward_of(key) is None}
    assert plain == set(ranges.RANGES)


@pytest.mark.parametrize(("key", "value"), numbers())
def test_what_is_within_and_what_is_not(key, value):
    found = ranges.of(key)
    ranges.check({key: list(value) if isinstance(value, tuple) else value})
    for end in (found.least, found.most):
        assert not found.wrong(end)
    whole = isinstance(value[0] if isinstance(value, tuple) else value, int)
    below = found.least - 1 if whole else np.nextafter(found.least, -np.inf)
    above = found.most + 1 if whole else np.nextafter(found.most, np.inf)
    for beyond in (below, above):
        with pytest.raises(UserError, match=f"^config.{key}=.*: must"):
            ranges.check({key: [beyond] if isinstance(value, tuple) else beyond})
