"""One kind of error for everything a user can put right: bad files, keys, flags and prompts."""

import os
import sys
from collections.abc import Callable

from srpo_jax import host


class UserError(Exception):
    """Something the user can mend. The message is one line: it names the file, key or flag, and the remedy."""


def run(main: Callable[[], None]) -> int:
    """Calls ``main`` and returns a process exit code: 0, or 1 after printing a ``UserError`` as one line on stderr.

    Every command passes here before JAX starts its devices: so GPUs may pin what the machine has (see ``host``).
    """
    host.raise_pinned_limit(os.environ, host.memory())
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
