"""The errors that are shown to a person as one message, without a traceback.

An error belongs here when a person can fix its cause outside of the code. Errors of one module stay in that module.
"""

INTERRUPTED = 130
"""The exit code of a command that the user interrupted with Ctrl-C."""


class UserError(Exception):
    """Something outside the code is wrong. The message names it, what was expected, and what to do."""


class StoreError(Exception):
    """The store stayed unreachable or refused a write, at every try. A later try may succeed."""


class DirectoryError(Exception):
    """The Census release directory does not answer, or its answer is not a directory. A later try may succeed."""
