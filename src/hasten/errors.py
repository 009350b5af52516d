"""The one exception a user sees."""


class UserError(Exception):
    """Bad input, told in one clear sentence: the command line prints it and exits with status 2."""
