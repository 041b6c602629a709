"""Errors that a user can cause and can put right."""

from collections.abc import Collection
from itertools import islice


class UserError(ValueError):
    """Bad input: one line that says what was wrong and what would be right."""


class CheckpointError(UserError):
    """A checkpoint that is missing, corrupt, foreign or does not fit the model."""


class ConfigError(UserError):
    """A configuration with unknown, mistyped or contradictory entries; the message lists all of them."""


class ExpressionError(UserError):
    """A referring expression that the text encoder cannot take."""


def named(names: Collection[str], limit: int = 5) -> str:
    """The first few names and how many more there are, for a message of one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(islice(names, limit)) + more
