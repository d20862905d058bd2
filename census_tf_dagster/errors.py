"""The one error a user can mend."""


class UserError(Exception):
    """Something outside the code is wrong; the message names it, what was expected and what to do."""
