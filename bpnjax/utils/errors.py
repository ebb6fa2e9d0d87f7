"""The exception for an impossible request of the user."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An impossible request. Its message is one line with the field, the value and what to do.

    The command prints this line on stderr and exits with code 2, without a traceback.
    """


def suggest(word: str, words: Iterable[str]) -> str:
    """The part of a message that proposes allowed words in place of a wrong one.

    Args:
      word: what was given.
      words: those allowed.

    Returns:
      The most similar words as a question, or all of them if none is similar.

    Example:
      >>> from bpnjax.utils.errors import suggest
      >>> suggest("bd_ecw", ["sgd", "bd_ewc"]), suggest("x", ["sgd", "bd_ewc"])
      ('did you mean bd_ewc?', 'choose from: sgd, bd_ewc')
    """
    close = difflib.get_close_matches(word, list(words), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from: {', '.join(words)}"
