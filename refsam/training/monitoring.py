"""Logs of a run: speed, memory, utilisation (MFU), and curves for TensorBoard."""

import hashlib
import json
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refsam.runtime.files import replace_file

_GIB = 2**30
# Side of the square matrices whose product measures a device's peak, and the number of products.
_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
_PRODUCTS = 5


class Meter:
    """Measures speed, memory and, if `peak_flops` of all devices is known, their utilisation since the last reading."""

    def __init__(self, device: torch.device, peak_flops: float | None) -> None:
        self.device = device
        self.peak_flops = peak_flops
        self.restart()

    def count(self, clips: int, flops: int) -> None:
        """Add a finished step's clips and operations."""
        self.steps += 1
        self.clips += clips
        self.flops += flops

    def read(self) -> dict[str, float]:
        """Means since the last reading, and this process's peak memory in GiB."""
        seconds = time.perf_counter() - self.begin
        values = {
            "seconds_per_step": seconds / self.steps,
            "clips_per_second": self.clips / seconds,
            "peak_memory_gib": peak_memory(self.device) / _GIB,
        }
        if self.peak_flops:
            values["mfu"] = self.flops / seconds / self.peak_flops
        self.restart()
        return values

    def restart(self) -> None:
        """Reset the counters, so that time between a reading and the next step does not count."""
        self.steps, self.clips, self.flops = 0, 0, 0
        self.begin = time.perf_counter()


def mean_losses(found: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over the batches of a step, by name; all values leave the device together, in one synchronisation."""
    pairs = [pair for losses in found for pair in losses.items()]
    values = torch.stack([value for _, value in pairs]).tolist()
    means: dict[str, float] = {}
    for (name, _), value in zip(pairs, values, strict=True):
        means[name] = means.get(name, 0.0) + value / len(found)
    return means


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of a few large matrix products, two for each multiplication with addition."""
    side = _PRODUCT_SIDE.get(device.type, _PRODUCT_SIDE["cpu"])
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(_PRODUCTS):
        begin = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds)


class Log:
    """Writes `log.jsonl`, and TensorBoard's curves if that is installed; only the first process is `active`.

    A run that resumes at `step` first removes the lines that an earlier run logged after it.
    """

    def __init__(self, folder: Path, step: int, active: bool, project: str | None = None) -> None:
        self.path = folder / "log.jsonl"
        self.curves: Any = None
        self.wandb: Any = None
        self.problems: list[str] = []
        self.active = active
        if not active:
            return
        self._take_back(step)
        if project is not None:
            self._open_wandb(folder, project)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.problems.append("no curves for TensorBoard: pip install 'refsam[train]'")
            return
        self.curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a line of the log; its numbers, except `step`, become points of curves."""
        if not self.active:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {n: v for n, v in record.items() if isinstance(v, int | float) and n != "step"}
        if self.curves is not None:
            for name, value in numbers.items():
                self.curves.add_scalar(name, value, record["step"])
        if numbers:
            self._to_wandb(lambda run: run.log(numbers, step=record["step"]))

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """An image (H, W, 3) uint8 RGB beside the curves."""
        if self.curves is not None:
            self.curves.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard and Weights & Biases."""
        if self.curves is not None:
            self.curves.close()
        self._to_wandb(lambda run: run.finish())

    def _open_wandb(self, folder: Path, project: str) -> None:
        """Open a run of the project that a resumed training continues."""
        try:
            import wandb
        except ImportError:
            self.problems.append("no Weights & Biases: pip install wandb")
            return
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        try:
            self.wandb = wandb.init(
                project=project, name=folder.name, id=name, resume="allow", dir=str(folder)
            )
        except Exception as error:  # no key, no network, no disk; log.jsonl still has everything
            self.problems.append(f"no Weights & Biases: {error}")

    def _to_wandb(self, act: Callable[[Any], object]) -> None:
        """Call `act` with the run at Weights & Biases, if there is one; its errors never end the training."""
        if self.wandb is None:
            return
        try:
            act(self.wandb)
        except Exception as error:
            self.wandb = None
            warnings.warn(f"Weights & Biases gets nothing more: {error}", stacklevel=2)

    def _take_back(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the line that a killed run was writing
                continue
        replace_file(self.path, "".join(f"{line}\n" for line in kept))
