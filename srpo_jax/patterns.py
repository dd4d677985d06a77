"""Regular expressions that users write. One that would go on for ever, as ``(a+)+b`` can, is stopped.

Written as Python's ``re`` has them; the engine is that of the package ``regex``, whose searches take a time limit.
"""

import warnings

import regex

from srpo_jax import schema
from srpo_jax.errors import UserError

PATIENCE = 1.0  # seconds for one text; what is not hopeless takes microseconds


class Pattern:
    """A regular expression.

    Args:
      text: the expression.
      where: the flag or key that gives it, for messages.

    Raises UserError, here and in the methods, if it is none or takes too long.
    """

    def __init__(self, text: str, where: str):
        self._name = f"{where}: {schema.shown(text)}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what another version of the syntax may bring
                self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            words = str(error) or type(error).__name__
            raise UserError(f"{self._name} is not a regular expression: {words}") from error

    def found_in(self, text: str) -> bool:
        """Whether it matches somewhere in a text."""
        return self._try(self._compiled.search, text)

    def fits(self, text: str) -> bool:
        """Whether it matches a whole text."""
        return self._try(self._compiled.fullmatch, text)

    def _try(self, function: object, text: str) -> bool:
        try:
            return function(text, timeout=PATIENCE) is not None
        except (TimeoutError, MemoryError, regex.error) as error:
            raise UserError(
                f"{self._name} takes more than {PATIENCE:g} s for {text[:60]!r}; write it without a repetition inside "
                "of a repetition"
            ) from error
