"""The one exception that means: the user asked for something impossible."""


class UserError(Exception):
    """An impossible request: its message is one line with the field, the value and the mend.

    The command turns it into that line on stderr and exit code 2, without a traceback.
    """
