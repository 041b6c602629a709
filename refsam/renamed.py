"""Old names that still work for one minor version, each with the name that replaced it.

All of them are in this file, so that removing them means deleting it and its callers. docs/stability.md says what is covered.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from refsam.errors import ConfigError

REMOVED_IN = "0.3"
Function = TypeVar("Function", bound=Callable[..., Any])

# By module; the new name is an attribute of the same module.
PYTHON_NAMES = {
    "refsam.session": {
        "step_together": "step_batch",
        "read_ahead": "prefetch_frames",
        "Share": "Shard",
    },
}
# Keyword arguments, by function.
ARGUMENTS = {"segment_videos": {"share": "shard"}}
# Attributes, by class.
ATTRIBUTES = {"ImageEncoder": {"recompute": "activation_checkpointing"}}
# Keys of training's configuration files, by the section that they stand in.
SETTINGS = {
    "": {"start": "init_from", "recompute": "activation_checkpointing"},
    "stages": {"back_frames": "tbptt_frames"},
    "optimiser": {
        "rates": "lr_overrides",
        "clip_norm": "max_grad_norm",
        "accumulation": "gradient_accumulation_steps",
        "average": "ema_decay",
    },
}
# Values of configuration files, by key.
VALUES = {"parallel": {"data": "ddp", "sharded": "fsdp"}}


class Option(NamedTuple):
    """A renamed option of a command; `values`, where given, are the values that only the old name took."""

    old: str
    new: str
    values: tuple[str, ...] = ()


_INFERENCE = Option("--protocol", "--inference", ("default", "paper"))
OPTIONS: dict[tuple[str, ...], tuple[Option, ...]] = {
    ("evaluate", "ref-davis17"): (
        _INFERENCE,
        Option("--joint", "--merge"),
        Option("--scoring", "--protocol"),
    ),
    ("evaluate", "ref-youtube-vos"): (_INFERENCE,),
    ("evaluate", "mevis"): (_INFERENCE,),
    ("evaluate", "refcoco"): (_INFERENCE, Option("--convention", "--protocol")),
}


class RenamedWarning(DeprecationWarning):
    """An old name was used."""


def warn(old: str, new: str) -> None:
    """Say that a name has changed, at the place that used it."""
    message = f"{old} is now {new}; the old name goes with version {REMOVED_IN}"
    warnings.warn(message, RenamedWarning, stacklevel=3)


def module_getattr(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that answers to its old names too."""

    def find(name: str) -> Any:
        new = PYTHON_NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", new)
        return getattr(import_module(module), new)

    return find


def arguments(function: Function) -> Function:
    """A decorator for functions with renamed keyword arguments."""
    names = ARGUMENTS[function.__name__]

    @wraps(function)
    def call(*positional: Any, **keywords: Any) -> Any:
        for old in names.keys() & keywords.keys():
            warn(f"{function.__name__}({old}=)", f"{names[old]}=")
            keywords[names[old]] = keywords.pop(old)
        return function(*positional, **keywords)

    return call  # type: ignore[return-value]


def attribute(owner_name: str, old: str) -> property:
    """A property for the old name of an attribute, which reads and writes the new one."""
    new = ATTRIBUTES[owner_name][old]

    def read(owner: Any) -> Any:
        warn(old, new)
        return getattr(owner, new)

    def write(owner: Any, value: Any) -> None:
        warn(old, new)
        setattr(owner, new, value)

    return property(read, write)


def settings(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """A configuration file's entries by their new keys and values. Raises ConfigError if an entry has both of its names."""
    result = {}
    for key, value in values.items():
        new = SETTINGS[section].get(key, key)
        if new != key:
            warn(key, new)
            if new in values:
                raise ConfigError(f"{key}: got it and {new}, want {new} alone")
        if not section and key in SETTINGS:
            value = _section(value, key)
        elif isinstance(value, str) and value in VALUES.get(new, {}):
            warn(f"{new}: {value}", f"{new}: {VALUES[new][value]}")
            value = VALUES[new][value]
        result[new] = value
    return result


def _section(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return settings(value, name)
    return [_section(item, name) for item in value] if isinstance(value, list | tuple) else value


def override(text: str) -> str:
    """An override ``section.key=value`` of a configuration file by its new key."""
    key, equals, value = text.partition("=")
    section, _, leaf = key.rpartition(".")
    new = SETTINGS.get(section, {}).get(leaf, leaf)
    if new == leaf:
        return text
    warn(key, new)
    return f"{section}.{new}{equals}{value}".removeprefix(".")


def command_line(words: list[str]) -> list[str]:
    """The words of a command line with the options' new names."""
    known = OPTIONS.get(tuple(words[:2]), ())
    result = list(words)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else ""
        for old, new, values in known:
            if option == old and (not values or value in values):
                warn(old, new)
                result[place] = new + equals + (value if equals else "")
    return result
