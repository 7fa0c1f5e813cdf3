"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a setting, a file or a command: its message is one sentence (or a few) that names the
    setting, its value, the limit and a way out. Entry points print the message alone and exit with status 1;
    every other exception is a bug of ours and keeps its traceback."""
