"""Errors that a user can cause and can correct."""

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any


class UserError(ValueError):
    """Wrong input: one line that says what was wrong and what would be right."""


class CheckpointError(UserError):
    """A checkpoint that is missing, corrupt, foreign or does not fit the model."""


class ConfigError(UserError):
    """A configuration with unknown, mistyped or contradictory entries; the message lists all of them."""


class ExpressionError(UserError):
    """A referring expression that the text encoder cannot take."""


def named(names: Collection[str], limit: int = 5, separator: str = ", ") -> str:
    """The first few names and how many more there are, for a message of one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(islice(names, limit)) + more


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For each entry of `now` that differs from `before`: what it was and what it is."""
    return [
        f"{key} was {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
