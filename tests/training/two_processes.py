"""Started twice by test_distributed.py, with torchrun: runs of two processes, and their state in one process.

Arguments: folder with a dataset in `videos`. Writes result.json there.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from refsam.training import loop
from refsam.training.loop import Trainer
from tests.training.runs import losses_of, run_settings


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    loop.draw_curve = lambda log, path: []  # it would take as long as a run
    result = {}
    for parallel in ("ddp", "fsdp"):
        trainer = Trainer(run_settings(folder, parallel, steps=2, parallel=parallel))
        result[parallel] = losses_of(trainer)
        parameters = dict(trainer.model.named_parameters())
        sharded = {name for name, value in parameters.items() if isinstance(value, DTensor)}
        result[f"{parallel} sharded"] = sorted(sharded)
        result[f"{parallel} whole"] = sorted(parameters.keys() - sharded)
        result[f"{parallel} wrapped"] = isinstance(trainer.shared.module, DistributedDataParallel)
        states = [v for o in trainer.optimisers for s in o.state.values() for v in s.values()]
        result[f"{parallel} optimiser"] = any(isinstance(value, DTensor) for value in states)
        # This process's part of the largest weight.
        largest = max(parameters.values(), key=lambda value: value.numel())
        local = largest.to_local() if isinstance(largest, DTensor) else largest
        result[f"{parallel} share"] = local.numel() / largest.numel()
    # Each way goes on from the state that the other has left.
    for parallel, other in (("fsdp", "ddp"), ("ddp", "fsdp")):
        trainer = Trainer(run_settings(folder, other, steps=3, parallel=parallel))
        result[f"{parallel} from {other}"] = losses_of(trainer)
    if trainer.processes.is_first:
        (folder / "result.json").write_text(json.dumps(result))
    trainer.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
