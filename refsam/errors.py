"""Errors that a user can cause and can put right."""


class UserError(ValueError):
    """Bad input: one line that says what was wrong and what would be right."""


class CheckpointError(UserError):
    """A checkpoint that is missing, corrupt, foreign or does not fit the model."""


class ConfigError(UserError):
    """A configuration with unknown, mistyped or contradictory entries; the message lists all of them."""


class ExpressionError(UserError):
    """A referring expression that the text encoder cannot take."""
