"""The training loop: steps, logging, validation, and a state that a killed run resumes from."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from refsam.checkpoint import tensors_sha256
from refsam.errors import UserError, named
from refsam.runtime.files import only_writer
from refsam.runtime.signals import StopRequest, WaitedTooLongError
from refsam.training.batches import (
    TrainingBatch,
    batches,
    open_photographs,
    open_stream,
    stage_at,
    with_steps,
)
from refsam.training.checkpointing import Weights
from refsam.training.configuration import check_configuration, keep_batches, learnt
from refsam.training.curve import draw_curve
from refsam.training.distributed import Processes, SharedModule
from refsam.training.flops import StepFlops
from refsam.training.module import NotANumberError, TrainingModule
from refsam.training.monitoring import Log, Meter, mean_losses
from refsam.training.optim import (
    build_optimisers,
    clip_gradients,
    describe_batches,
    learning_rate,
    update_average,
)
from refsam.training.settings import TrainingSettings
from refsam.training.start import build_model, check_expressions, every_expression
from refsam.training.state import Progress, read_state, write_state
from refsam.training.validation import open_clips
from refsam.training.validator import Validator

# Most samples that an error message names.
_NAMED = 4
# Status that processes exchange within a step; the largest wins.
_FINE, _SAVE, _STOP_AFTER_STEP, _FAILED = 0, 1, 2, 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Longest wait for the data of the next step after a request to stop.
_PATIENCE_SECONDS = 5.0


class Trainer:
    """Trains one model from settings; `run` yields the log's numeric records.

    The output folder holds `log.jsonl`, `tensorboard/`, `examples/`, `state.safetensors` (the state that `run` resumes from, with
    the previous one beside it), and the averaged model: `best/` has the best validation score, `model/` is the last.
    `stopped_by` is the signal that ended `run` early, 0 for none. `say` gets messages for the reader of the log. With
    `allow_changes` a run may continue with another configuration.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        say: Callable[[str], None] = lambda text: None,
        *,
        allow_changes: bool = False,
    ) -> None:
        self.settings = settings
        self.say = say
        self.allow_changes = allow_changes
        self.output = Path(settings.output)
        self.processes = Processes.join(settings.device)
        if self.processes.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.datasets = [entry.open() for entry in settings.data.datasets]
        self.settings = settings = with_steps(settings, self.datasets, self.processes.count)
        self.drawer = open_photographs(settings.data.photographs)
        self.model = build_model(settings, self.datasets, self.drawer).to(self.processes.device)
        check_expressions(self.model.text_encoder, self.datasets)
        self.model.image_encoder.activation_checkpointing = settings.activation_checkpointing
        clips = open_clips(settings.validation, self.model.image_size)
        self.module = TrainingModule(self.model, settings).to(self.processes.device)
        self.module.train()
        if self.module.features is not None:
            self.module.features.encode_all(every_expression(settings, self.datasets))
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        self.accumulation = settings.optimiser.gradient_accumulation_steps
        self.progress = Progress(
            frozen=tensors_sha256(frozen),
            threads=torch.get_num_threads(),
            processes=self.processes.count,
            batches=self.accumulation * self.processes.count,
        )
        self.shared = SharedModule(self.module, settings.parallel, self.processes)
        if settings.compile:
            self.model.image_encoder.compile()
        self.optimisers = build_optimisers(
            torch.nn.ModuleList([self.model, self.module.head]), settings.optimiser
        )
        self.weights = Weights(
            self.module, self.optimisers, self.processes, settings.optimiser.ema_decay is not None
        )
        self.validator = (
            None if clips is None else Validator(settings, clips, self.weights, self.shared)
        )
        self.steps = sum(stage.steps for stage in settings.stages)
        self.saved_step: int | None = None
        self.stopped_by = 0
        self.skipped: list[str] = []

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.progress.step

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the last saved step to the end, or until a signal.

        Raises UserError if a loss or gradient is not a number, if another process trains into the same folder, and as
        `resume` does.
        """
        with (
            only_writer(self.output / "run", wait=False, again=True)
            if self.processes.is_first
            else nullcontext()
        ):
            problems = self.resume()
            self.log = Log(self.output, self.step, self.processes.is_first, self.settings.wandb)
            self.flops = StepFlops(self.settings, self.module, self.processes)
            self.meter = Meter(self.processes.device, self.flops.peak)
            try:
                self._note("state", problems)
                self._note("batch", describe_batches(self.settings, self.processes.count))
                self._note("log", self.log.problems)
                self._note("data", [n for d in self.datasets for n in (*d.notes, *d.faults)])
                with StopRequest(_SIGNALS) as request:
                    yield from self._steps(request)
            finally:
                self.log.close()
            if self.processes.is_first:
                self._note("curve", draw_curve(self.log.path, self.output / "curve.png"))
            if not self.stopped_by:
                self.weights.save_model(self.output / "model", self.settings.delta)
                self.processes.wait()

    def leave(self) -> None:
        """Leave the process group; the module that exchanges gradients is released first, or it might wait forever."""
        self.shared.release()
        self.processes.leave()

    def _steps(self, request: StopRequest) -> Iterator[dict[str, float]]:
        arriving = self._batches()
        self.meter.restart()
        is_missing = self.step > 0 and self.progress.validated < self.step
        if is_missing and self._is_due(self.settings.validation.every):
            yield from self._validate_and_save()  # the previous process ended during validation
        while self.step < self.steps and not self._has_stalled():
            try:
                status = self.train_step(arriving, request)
            except WaitedTooLongError:
                self._stop_waiting(request)
                return
            is_last = self.step == self.steps or status == _STOP_AFTER_STEP
            is_validated = self._is_due(self.settings.validation.every)
            if self._is_due(self.settings.log_every):
                yield self._read_out()
            if is_last or is_validated or status == _SAVE or self._is_due(self.settings.save_every):
                self.save()
                request.save_wanted = False
            if is_validated:
                yield from self._validate_and_save()
            if is_last and self.step < self.steps:
                self.stopped_by = self.processes.maximum(request.signal)
                return

    def _validate_and_save(self) -> Iterator[dict[str, float]]:
        """Validate a state that is saved already, and save the result."""
        yield self.validate()
        self.save()

    def _has_stalled(self) -> bool:
        """Whether validation has not improved within the settings' patience."""
        patience = self.settings.validation.patience
        if patience is None or self.progress.worse < patience:
            return False
        best = f"the best was at step {self.progress.best_step}"
        self._note("stopped", [f"no better score in {patience} validations; {best}"])
        return True

    def _stop_waiting(self, request: StopRequest) -> None:
        """End a run whose data does not arrive: a single process saves its state, several keep their last one."""
        if self.processes.count > 1:
            raise UserError(
                f"stopped by {signal.Signals(request.signal).name} while waiting for data; {self._kept()}"
            ) from None
        self.save()
        self.stopped_by = request.signal

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.steps)

    def _batches(self) -> Iterator[TrainingBatch]:
        """This process's batches, starting with the next step."""
        count = self.accumulation * self.processes.count
        size = self.model.image_size
        self.stream = open_stream(self.settings, self.datasets, size, count, self.drawer)
        return batches(
            self.stream,
            self.step,
            self.steps,
            self.settings.workers,
            self.processes.rank,
            self.processes.count,
            pin=self.processes.device.type == "cuda",
        )

    def train_step(self, arriving: Iterator[TrainingBatch], request: StopRequest) -> int:
        """One step on the next batches; returns whether to stop after it. Raises UserError."""
        settings = self.settings.optimiser
        stage = stage_at(self.settings.stages, self.step)
        together = self.accumulation * self.processes.count
        rate = learning_rate(self.step, self.steps, settings, stage.clips * together)
        for group in (group for each in self.optimisers for group in each.param_groups):
            group["lr"] = rate * group["scale"]
        self.module.zero_grad(set_to_none=True)
        found: list[Mapping[str, Tensor]] = []
        status, of_batch = _FINE, 0
        names: tuple[str, ...] = ()
        for number in range(self.accumulation):
            with request.waiting(_PATIENCE_SECONDS):
                batch = next(arriving)
            names += batch.clips.names
            of_batch = self.flops.of(self.shared, batch, stage)
            with self.shared.accumulating(number + 1 == self.accumulation):
                losses, agreed = self._losses(batch, request)
                status = max(status, agreed)
                (losses["total"] / self.accumulation).backward()
            found.append({name: value.detach() for name, value in losses.items()})
            self.skipped += batch.clips.skipped
        self.shared.finish_gradients()
        norm = clip_gradients(self.model.parameters(), settings.max_grad_norm)
        if not math.isfinite(norm):
            raise self._stop(NotANumberError("gradient", names))
        for optimiser in self.optimisers:
            optimiser.step()
        if settings.ema_decay:
            parameters = dict(self.model.named_parameters())
            update_average(self.weights.average, parameters, settings.ema_decay, self.step)
        self.progress.step += 1
        self.progress.counted += 1
        self._flops_of_step = of_batch * together
        self.meter.count(len(names) * self.processes.count, self._flops_of_step)
        sums = mean_losses(found) | {"gradient_norm": norm, "learning_rate": rate}
        for name, of_step in sums.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + of_step
        return status

    def _losses(self, batch: TrainingBatch, request: StopRequest) -> tuple[dict[str, Tensor], int]:
        """Losses of a batch, and whether the processes stop after this step; raises UserError in all if one fails."""
        problem: NotANumberError | None = None
        losses: dict[str, Tensor] = {}
        try:
            losses = self.shared(batch, stage_at(self.settings.stages, self.step))
            status = _STOP_AFTER_STEP if request.signal else _SAVE if request.save_wanted else _FINE
        except NotANumberError as error:
            problem, status = error, _FAILED
        agreed = self.processes.maximum(status)
        if problem:
            raise self._stop(problem) from None
        if agreed == _FAILED:
            raise UserError(f"another process stopped at step {self.step} and says why")
        return losses, agreed

    def _stop(self, problem: NotANumberError) -> UserError:
        names = named(problem.names, _NAMED, "; ")
        return UserError(
            f"the {problem.what} is not a number at step {self.step} (seed {self.settings.seed}), on {names}; {self._kept()}: "
            "lower optimiser.learning_rate, or look at the data"
        )

    def _read_out(self) -> dict[str, float]:
        """Log the means since the last line."""
        self._log_skipped()
        progress = self.progress
        own = {name: value / progress.counted for name, value in progress.sums.items()}
        record = self.processes.means(own) | {"step": self.step} | self.meter.read()
        record |= self.stream.course(self.step)
        record["hours_left"] = record["seconds_per_step"] * (self.steps - self.step) / 3600
        if progress.unreadable:
            record["unreadable"] = progress.unreadable
        progress.sums, progress.counted = {}, 0
        self.log.write(record)
        return record

    def _log_skipped(self) -> None:
        skipped = [text for texts in self.processes.gather(self.skipped) for text in texts]
        self.skipped = []
        if skipped:
            self.progress.unreadable += len(skipped)
            self.log.write({"step": self.step, "skipped": skipped})

    def validate(self) -> dict[str, float]:
        """Score the averaged model, log it, draw examples; the best so far is saved as `best/`, the `keep` best below `top/`."""
        assert self.validator is not None
        record = self.validator.run(self.progress, self.log, self.skipped)
        self._log_skipped()
        if not record:
            raise UserError(f"validation: none of its clips can be read; {self._kept()}")
        self.log.write(record)
        self.meter.restart()
        return record

    def save(self) -> None:
        """Write the resumable state; the one before stays beside it. Raises UserError where it cannot be written."""
        self._log_skipped()
        tensors = self.weights.state()
        # Each process has sums of its own: the mean over them is what the log gets.
        self.progress.sums = self.processes.means(self.progress.sums)
        problem = None
        if self.processes.is_first:
            try:
                write_state(self.output, tensors, self.progress, learnt(self.settings))
            except (OSError, SafetensorError) as error:
                problem = (
                    f"the state of step {self.step} cannot be written ({error}); {self._kept()}"
                )
        if problem := self.processes.from_first(problem):
            raise UserError(problem)
        self.saved_step = self.step

    def _kept(self) -> str:
        if self.saved_step is None:
            return "no state was saved before it"
        return f"the state of step {self.saved_step} is kept in {self.output}"

    def resume(self) -> list[str]:
        """Load the newest state that is whole, if there is one; in words, what was wrong with a newer one and what is new.

        Raises UserError for a state of another configuration, unless changes are allowed.
        """
        found = read_state(self.output) if self.processes.is_first else None
        tensors, progress, before, problems = found or ({}, None, {}, [])
        progress, before, problems = self.processes.from_first((progress, before, problems))
        if progress is None:
            return []
        if problems:
            problems.append(f"going on from step {progress.step}")
        if progress.frozen != self.progress.frozen:
            raise UserError(
                f"{self.output}: its state was trained on other frozen weights than those of init_from and model: put them back"
            )
        self.weights.load(self.processes.tensors_from_first(tensors), self.output)
        problems += check_configuration(before, self.settings, self.allow_changes)
        self.accumulation, said = keep_batches(
            progress, self.progress, before, self.settings, self.allow_changes
        )
        problems += said
        self.progress, self.saved_step = progress, progress.step
        return problems

    def _note(self, kind: str, texts: Sequence[str]) -> None:
        """Print and log a note."""
        if texts and self.processes.is_first:
            for text in texts:
                self.say(f"{kind}: {text}")
            self.log.write({"step": self.step, kind: list(texts)})
