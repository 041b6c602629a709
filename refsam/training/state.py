"""The resumable state of a run: one safetensors file, the one before it, and a checksum that tells a damaged one."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refsam.checkpoint import tensors_sha256
from refsam.errors import UserError
from refsam.runtime.files import follow_umask

STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
# Written by versions before safetensors; ignoring it would start the run again silently.
_FORMER = "state.pt"


@dataclass
class Progress:
    """A run's progress, beside its tensors.

    `sums` of the losses of the `counted` steps since the last line of the log; number of `unreadable` files; the `best`
    validation score and its step; the `top` scores as (score, step); the number of `worse` validations since the best; the step
    of the last one (`validated`); `frozen`, the digest of the frozen weights, which the state does not hold. A step takes
    `batches` over all `processes` (0: not recorded by an earlier version).
    """

    step: int = 0
    counted: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    best: float | None = None
    best_step: int = 0
    frozen: str = ""
    threads: int = 0
    processes: int = 1
    batches: int = 0
    validated: int = 0
    worse: int = 0
    top: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.top = [(score, step) for score, step in self.top]  # JSON knows lists only


def write_state(
    folder: Path,
    tensors: Mapping[str, Tensor],
    progress: Progress,
    configuration: Mapping[str, Any],
) -> None:
    """Write the state under another name, then rename it; the last state becomes the previous one.

    `configuration` is the result of `refsam.training.configuration.learnt`. If the state cannot be written, OSError or
    SafetensorError is raised and no partial file is left.
    """
    path = folder / STATE
    temporary = path.with_suffix(".tmp")
    metadata = {
        "progress": json.dumps(asdict(progress)),
        "configuration": json.dumps(dict(configuration)),
        "digest": tensors_sha256(tensors),
    }
    try:
        save_file(dict(tensors), temporary, metadata)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
        raise
    follow_umask(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, folder / PREVIOUS)
    os.replace(temporary, path)


def read_state(
    folder: Path,
) -> tuple[dict[str, Tensor], Progress, dict[str, Any], list[str]] | None:
    """Read the newest undamaged state, and describe the problem of a newer one; None if there is no state.

    Returns tensors, progress, configuration (empty in states of earlier versions) and problems. Raises UserError if
    all states are damaged.
    """
    problems: list[str] = []
    for path in (folder / STATE, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            return *_read(path), problems
        except PermissionError:
            raise UserError(
                f"{path}: may not be read by this user: ask its owner to let you (chmod g+r), or take another output"
            ) from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{path} is damaged ({error})")
    if problems:
        raise UserError(f"{'; '.join(problems)}: remove the damaged files to start again")
    if (folder / _FORMER).exists():
        raise UserError(
            f"{folder / _FORMER} is the state of an earlier version, which this one cannot read: move it, or take another output"
        )
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    open(path, "rb").close()  # safetensors would call a file without read permission missing
    with safe_open(path, "pt") as file:
        metadata: dict[str, Any] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if tensors_sha256(tensors) != metadata["digest"]:
        raise ValueError("its checksum differs")
    configuration = json.loads(metadata.get("configuration", "{}"))
    return tensors, Progress(**json.loads(metadata["progress"])), configuration
