"""The training loop: steps, what is logged and validated on the way, and a state that a killed run goes on from."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam.checkpoint import Checkpoint, write_checkpoint
from refsam.checkpoint.files import shorten
from refsam.data import ReferringDataset
from refsam.data.generated.grammar import vocabulary
from refsam.data.photographs.scenes import SceneDrawer
from refsam.data.photographs.words import load_words
from refsam.errors import UserError
from refsam.model import RefSAM, SmallTextEncoder, word_tokenizer
from refsam.model.model_card import card_arguments
from refsam.model.vocabulary import extend_vocabulary
from refsam.runtime.signals import StopRequest
from refsam.training.batches import (
    DatasetStream,
    GeneratedStream,
    TrainingBatch,
    batches,
    open_datasets,
    open_photographs,
    stage_at,
)
from refsam.training.distributed import Processes, SharedModule, local, spread_like, whole
from refsam.training.flops import count_flops
from refsam.training.module import NotANumberError, TrainingModule
from refsam.training.monitoring import Log, Meter, measure_peak_flops
from refsam.training.optim import (
    build_optimisers,
    clip_gradients,
    learning_rate,
    update_average,
)
from refsam.training.settings import StageSettings, TrainingSettings
from refsam.training.state import Progress, digest, read_state, write_state
from refsam.training.validation import open_clips, score_clips

# How many samples an error message names.
_NAMED = 4
# What processes tell each other in the middle of a step; a larger number prevails.
_FINE, _STOP_AFTER_STEP, _FAILED = 0, 1, 2


class Trainer:
    """Trains one model from settings; `run` yields the records of the log that hold numbers.

    The output folder holds `log.jsonl` and `tensorboard/`, `state.safetensors` (what `run` resumes from; the previous one beside
    it), `examples/`, and the averaged model as `best/`, by validation, and `model/`, the last. `stopped_by` is the signal
    that ended `run` early, 0 for none. `say` is told in words what a reader of the log must know.
    """

    def __init__(
        self, settings: TrainingSettings, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.settings = settings
        self.say = say
        self.output = Path(settings.output)
        self.processes = Processes.join(settings.device)
        if self.processes.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.datasets = open_datasets(settings)
        self.drawer = open_photographs(settings.data.photographs)
        self.model = _build_model(settings, self.datasets, self.drawer).to(self.processes.device)
        self.model.image_encoder.activation_checkpointing = settings.activation_checkpointing
        self.clips = open_clips(settings.validation, self.model.image_size)
        self.module = TrainingModule(self.model, settings).to(self.processes.device)
        self.module.train()
        self.head = self.module.head
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        self.progress = Progress(
            frozen=digest(frozen),
            threads=torch.get_num_threads(),
            processes=self.processes.count,
        )
        self.shared = SharedModule(self.module, settings.parallel, self.processes)
        if settings.compile:
            self.model.image_encoder.compile()
        self.optimisers = build_optimisers(
            torch.nn.ModuleList([self.model, self.head]), settings.optimiser
        )
        self.average = self._copy_of_trained() if settings.optimiser.ema_decay else {}
        self.steps = sum(stage.steps for stage in settings.stages)
        self.saved_step: int | None = None
        self.stopped_by = 0
        self.skipped: list[str] = []
        self._flops_of_step = 0
        self._counted_stage: StageSettings | None = None

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.progress.step

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the last saved step to the end, or to a signal; raises UserError where something stops being a number."""
        problems = self.resume()
        self.log = Log(self.output, self.step, self.processes.is_first)
        self.meter = Meter(self.processes.device, self._peak_flops())
        try:
            self._note("state", problems)
            self._note("log", self.log.problems)
            self._note("data", [note for dataset in self.datasets for note in dataset.notes])
            with StopRequest() as request:
                yield from self._steps(request)
        finally:
            self.log.close()
        if not self.stopped_by:
            self._save_model("model")

    def _steps(self, request: StopRequest) -> Iterator[dict[str, float]]:
        arriving = self._batches()
        self.meter.restart()
        while self.step < self.steps:
            status = self.train_step(arriving, request)
            is_last = self.step == self.steps or status == _STOP_AFTER_STEP
            if self._is_due(self.settings.log_every):
                yield self._read_out()
            if self._is_due(self.settings.validation.every):
                yield self.validate()
            if is_last or self._is_due(self.settings.save_every):
                self.save()
            if is_last and self.step < self.steps:
                self.stopped_by = self.processes.maximum(request.signal)
                return

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.steps)

    def _batches(self) -> Iterator[TrainingBatch]:
        """This process's batches from the next step on."""
        count = self.settings.optimiser.gradient_accumulation_steps * self.processes.count
        stream = (
            DatasetStream(self.settings, self.datasets, count)
            if self.datasets
            else GeneratedStream(self.settings, self.model.image_size, count, self.drawer)
        )
        return batches(
            stream,
            self.step,
            self.steps,
            self.settings.workers,
            self.processes.rank,
            self.processes.count,
        )

    def train_step(self, arriving: Iterator[TrainingBatch], request: StopRequest) -> int:
        """One step on the next batches; returns whether to stop after it. Raises UserError."""
        settings = self.settings.optimiser
        rate = learning_rate(self.step, self.steps, settings)
        for group in (group for each in self.optimisers for group in each.param_groups):
            group["lr"] = rate * group["scale"]
        self.module.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        status = _FINE
        names: tuple[str, ...] = ()
        for number in range(settings.gradient_accumulation_steps):
            batch = next(arriving)
            names += batch.clips.names
            self._count_flops(batch)
            with self.shared.accumulating(number + 1 == settings.gradient_accumulation_steps):
                losses, agreed = self._losses(batch, request)
                status = max(status, agreed)
                (losses["total"] / settings.gradient_accumulation_steps).backward()
            for name, value in losses.items():
                sums[name] = (
                    sums.get(name, 0.0)
                    + float(value.detach()) / settings.gradient_accumulation_steps
                )
            self.skipped += batch.clips.skipped
        self.shared.finish_gradients()
        norm = clip_gradients(self.model.parameters(), settings.max_grad_norm)
        if not math.isfinite(norm):
            raise self._stop(NotANumberError("gradient", names))
        for optimiser in self.optimisers:
            optimiser.step()
        if settings.ema_decay:
            parameters = dict(self.model.named_parameters())
            update_average(self.average, parameters, settings.ema_decay, self.step)
        self.progress.step += 1
        self.progress.counted += 1
        self.meter.count(len(names) * self.processes.count, self._flops_of_step)
        sums |= {"gradient_norm": norm, "learning_rate": rate}
        for name, of_step in sums.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + of_step
        return status

    def _peak_flops(self) -> float | None:
        """What all devices together reach, where it is to be known."""
        given = self.settings.peak_tflops
        if given is None:
            return None
        if given != "measure":
            return 1e12 * given * self.processes.count
        dtype = getattr(torch, self.settings.dtype)
        return measure_peak_flops(self.processes.device, dtype) * self.processes.count

    def _count_flops(self, batch: TrainingBatch) -> None:
        """What a step of this stage takes on all devices, counted once where the devices' peak is known."""
        stage = stage_at(self.settings.stages, self.step)
        if self.meter.peak_flops is None or self._counted_stage is stage:
            return
        self._counted_stage = stage
        try:
            flops = count_flops(self.shared, self.model, batch, stage)
        except NotANumberError:  # the step itself will find it
            return
        self.head.zero_grad(set_to_none=True)
        self._flops_of_step = (
            flops * self.settings.optimiser.gradient_accumulation_steps * self.processes.count
        )

    def _losses(self, batch: TrainingBatch, request: StopRequest) -> tuple[dict[str, Tensor], int]:
        """Losses of a batch, and whether the processes stop after this step; raises UserError in all if one fails."""
        problem: NotANumberError | None = None
        losses: dict[str, Tensor] = {}
        try:
            losses = self.shared(batch, stage_at(self.settings.stages, self.step))
        except NotANumberError as error:
            problem = error
        status = _FAILED if problem else _STOP_AFTER_STEP if request.signal else _FINE
        agreed = self.processes.maximum(status)
        if problem:
            raise self._stop(problem) from None
        if agreed == _FAILED:
            raise UserError(f"another process stopped at step {self.step} and says why")
        return losses, agreed

    def _stop(self, problem: NotANumberError) -> UserError:
        names = problem.names
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        kept = (
            "no state was saved before it"
            if self.saved_step is None
            else f"the state of step {self.saved_step} is kept in {self.output}"
        )
        return UserError(
            f"the {problem.what} is not a number at step {self.step} (seed {self.settings.seed}), on {'; '.join(names[:_NAMED])}"
            f"{more}; {kept}: lower optimiser.learning_rate, or look at the data"
        )

    def _read_out(self) -> dict[str, float]:
        """Log the means since the last line."""
        self._log_skipped()
        progress = self.progress
        own = {name: value / progress.counted for name, value in progress.sums.items()}
        record = self.processes.means(own) | {"step": self.step} | self.meter.read()
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
        """Score the averaged model, log it, draw examples; the best so far is saved as `best/`."""
        assert self.clips is not None
        is_sharded = self.settings.parallel == "fsdp"
        # Sharded weights are gathered frame by frame, so every process must go through the same frames.
        begin, every = (0, 1) if is_sharded else (self.processes.rank, self.processes.count)
        with self.averaged(), self.shared.gathered():
            self.model.eval()
            own = score_clips(
                self.model, self.clips, range(begin, len(self.clips), every), self._draw
            )
            self.model.train()
        rows = own if is_sharded else [row for part in self.processes.gather(own) for row in part]
        region, contour = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
        score = (region + contour) / 2
        record = {"step": self.step, "J": region, "F": contour, "J&F": score}
        self.log.write(record)
        if self.progress.best is None or score > self.progress.best:
            self.progress.best, self.progress.best_step = score, self.step
            self._save_model("best")
        self.meter.restart()
        return record

    def _draw(self, index: int, image: Any) -> None:
        if index >= self.settings.validation.examples or not self.processes.is_first:
            return
        from PIL import Image

        folder = self.output / "examples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{self.step:06d}_{index:02d}.png")
        self.log.picture(f"example_{index:02d}", image, self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model's weights are the averaged ones."""
        if not self.average:
            yield
            return
        trained = self._trained()
        kept = {name: local(value).clone() for name, value in trained.items()}
        try:
            self._fill(trained, {name: local(value) for name, value in self.average.items()})
            yield
        finally:
            self._fill(trained, kept)

    @staticmethod
    @torch.no_grad()
    def _fill(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            local(targets[name]).copy_(value)

    def averaged_model(self) -> RefSAM:
        """A copy of the model, in eval mode, with the averaged weights; every process must ask for it."""
        return RefSAM.from_checkpoint(self._checkpoint(delta=False)).to(self.processes.device)

    def _checkpoint(self, delta: bool) -> Checkpoint:
        with self.averaged():
            stored = self.model.to_checkpoint(delta)
            tensors = {n: whole(t).detach().cpu().clone() for n, t in stored.tensors.items()}
        return Checkpoint(stored.config, tensors, stored.kind, stored.tokenizer, stored.sources)

    def _save_model(self, name: str) -> None:
        """Write the averaged model: without what stands in SAM's file, where the model stands on one."""
        stands_on_sam = "sam" in self.model.sources and self.model.config.frozen
        stored = self._checkpoint(self.settings.delta and stands_on_sam)
        if self.processes.is_first:
            write_checkpoint(self.output / name, stored)
            card = self.model.generate_model_card(**card_arguments(stored, None))
            card.save(self.output / name / "README.md")

    def _trained(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _copy_of_trained(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._trained().items()}

    def save(self) -> None:
        """Write the resumable state; the one before stays beside it."""
        self._log_skipped()
        state = self._weights() | self._optimiser_state()
        # In one order: all processes gather the same tensor at a time.
        tensors = {n: whole(state[n]).detach().cpu().contiguous() for n in sorted(state)}
        # Each process has sums of its own: the mean over them is what the log gets.
        self.progress.sums = self.processes.means(self.progress.sums)
        if self.processes.is_first:
            write_state(self.output, tensors, self.progress)
        self.saved_step = self.step

    def _weights(self) -> dict[str, Tensor]:
        """What training changes in the module, and its running average, by name."""
        frozen = {n for n, p in self.module.named_parameters() if not p.requires_grad}
        weights = {n: t for n, t in self.module.state_dict().items() if n not in frozen}
        return weights | {f"average.{name}": value for name, value in self.average.items()}

    def _optimiser_state(self) -> dict[str, Tensor]:
        """What the optimisers remember of each parameter that was stepped."""
        state = {}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for optimiser in self.optimisers:
            for parameter, values in optimiser.state.items():
                for key, value in values.items():
                    state[f"optimiser.{key}.{names[id(parameter)]}"] = value
        return state

    def resume(self) -> list[str]:
        """Load the newest state that is whole, if there is one; in words, what was wrong with a newer one and what is new."""
        found = read_state(self.output) if self.processes.is_first else None
        tensors, progress, problems = found or ({}, None, [])
        progress, problems = self.processes.from_first((progress, problems))
        if progress is None:
            return []
        if problems:
            problems.append(f"going on from step {progress.step}")
        if progress.frozen != self.progress.frozen:
            raise UserError(
                f"{self.output}: its state was trained on other frozen weights than those of init_from and model: put them back"
            )
        for what in ("threads", "processes"):
            before, now = getattr(progress, what), getattr(self.progress, what)
            if before != now:
                problems.append(f"{before} {what} before, now {now}: losses will differ slightly")
                setattr(progress, what, now)
        self._load(self.processes.tensors_from_first(tensors))
        self.progress, self.saved_step = progress, progress.step
        return problems

    def _load(self, tensors: dict[str, Tensor]) -> None:
        expected = self._weights()
        stored = {name for name in tensors if not name.startswith("optimiser.")}
        if wrong := sorted(stored ^ expected.keys()):
            raise UserError(
                f"{self.output}: its state is of another model ({shorten(wrong)} differ): take another output"
            )
        self._fill(
            expected,
            {n: local(spread_like(tensors[n], expected[n])) for n in expected},
        )
        parameters = dict(self.module.named_parameters())
        owner = {id(p): o for o in self.optimisers for g in o.param_groups for p in g["params"]}
        for name in sorted(tensors.keys() - stored):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            value = tensors[name]
            # The number of steps is no tensor of the parameter's shape, and never sharded.
            placed = value.to(target.device) if key == "step" else spread_like(value, target)
            owner[id(target)].state[target][key] = placed

    def _note(self, kind: str, texts: Sequence[str]) -> None:
        """Say and log what is no number."""
        if texts and self.processes.is_first:
            for text in texts:
                self.say(f"{kind}: {text}")
            self.log.write({"step": self.step, kind: list(texts)})


def _build_model(
    settings: TrainingSettings, datasets: Sequence[ReferringDataset], drawer: SceneDrawer | None
) -> RefSAM:
    """A new model, or the one to start from; a small text encoder knows every word that the data can hold."""
    words = [] if drawer is None else drawer.folder.vocabulary()
    if settings.init_from is None:
        known = [*vocabulary(), *words, *_words(datasets)]
        return RefSAM(settings.architecture, tokenizer=word_tokenizer(known))
    model = RefSAM.from_pretrained(settings.init_from, sam=settings.sam)
    if words and isinstance(model.text_encoder, SmallTextEncoder):
        extend_vocabulary(model.text_encoder, words, load_words().relatives())
    return model


def _words(datasets: Sequence[ReferringDataset]) -> list[str]:
    """What a small text encoder that starts from nothing must know beside the generated sentences."""
    texts = (e.text for dataset in datasets for row in dataset.sentences.values() for e in row)
    return sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})
