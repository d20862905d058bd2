"""Errors that tell a person something, and nothing of the code."""


class UserError(Exception):
    """Something outside the code is wrong; the message names it, what was expected and what to do."""


class DirectoryError(Exception):
    """The Census release directory does not answer, or answers something else. A later look may succeed."""
