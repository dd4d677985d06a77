"""Flags of XLA come and go with its versions, and one that it does not know ends the process."""

import os
import subprocess
import sys

# Flags are read when a client is made; of jaxlib alone, which takes a fraction of a second.
CLIENT = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def known(*flags: str) -> str:
    """Those flags, as ``--name=value``, that the installed XLA knows; in one string, as in ``XLA_FLAGS``."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    child = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True)
    _, _, refused = child.stderr.partition("in XLA_FLAGS: ")
    return " ".join(flag for flag in flags if flag not in refused.split())
