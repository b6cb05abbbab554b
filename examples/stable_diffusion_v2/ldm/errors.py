"""The one exception that reaches the user as a message instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do about it."""
