"""Errors a user can act on. Each says what was given, what was expected and what to do."""


class LibMoEError(Exception):
    """Base of every error that the command line prints as one line, with exit code 2."""


class ConfigError(LibMoEError, ValueError):
    """An option or a combination of options that cannot work (unknown router, top_k > num_experts, ...)."""


class DataError(LibMoEError, ValueError):
    """A training record that cannot be used. Names the file and the record."""


class CheckpointError(LibMoEError, RuntimeError):
    """A checkpoint that is truncated, foreign, of another layout, or that could not be written."""


class DivergedError(LibMoEError, RuntimeError):
    """A loss or a gradient that is not finite. What was saved before it is unharmed."""


class BackendError(LibMoEError, RuntimeError):
    """A backend asked for by name that is not usable here. Names what is missing and how to get it."""


def in_one_line(error: Exception) -> str:
    """What a library's error says, its first two lines in one: for the end of a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or repr(error)
