"""The one exception that means: the user asked for something impossible."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An impossible request: its message is one line with the field, the value and the mend.

    The command turns it into that line on stderr and exit code 2, without a traceback.
    """


def suggest(word: str, words: Iterable[str]) -> str:
    """What a message says of a word that is none of those allowed.

    Args:
      word: what was given.
      words: those allowed.

    Returns:
      The nearest ones as a question, else all.

    Example:
      >>> from bpnjax.utils.errors import suggest
      >>> suggest("bd_ecw", ["sgd", "bd_ewc"]), suggest("x", ["sgd", "bd_ewc"])
      ('did you mean bd_ewc?', 'choose from: sgd, bd_ewc')
    """
    close = difflib.get_close_matches(word, list(words), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from: {', '.join(words)}"
