"""The flags under which the tests run are those that the installed XLA knows."""

from helpers import xla


def test_flags_that_xla_lacks_are_left_out():
    kept = "--xla_backend_optimization_level=0"
    assert xla.known("--xla_no_such_flag=1", kept, "--xla_nor_this_one=2") == kept
    assert xla.known(kept) == kept
