"""The one error of a user: what is wrong and where, and what to do next."""


class UserError(Exception):
    """A mistake that the person can mend. The command line prints it as one line plus one line of hint, exit status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
