"""Provenance of a result: command, time, versions, system."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("refsam", "torch", "triton", "numpy", "scipy", "pillow", "transformers", "pycocotools")


def provenance() -> dict[str, str]:
    """The exact command, when it ran, and versions; nothing is imported for it."""
    versions = {name: found for name in _PACKAGES if (found := installed(name))}
    return {
        "command": command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
    }


def command() -> str:
    """The command line as it can be pasted into a shell."""
    return shlex.join(["refsam", *sys.argv[1:]])


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
