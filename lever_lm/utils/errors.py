"""Errors for the user: what is wrong, what was found, and the command or flag that mends it."""


class LeverError(Exception):
    """A run cannot go on for a reason the user can mend. The CLI prints the message alone and exits with 1."""


class UsageError(LeverError):
    """The command line itself is wrong (unknown key, name or value). The CLI exits with 2."""


class MendableError(LeverError):
    """An error with two parts: what was found, and what mends it."""

    def __init__(self, found: str, mend: str):
        super().__init__(f"{found}: {mend}")
        self.found, self.mend = found, mend
