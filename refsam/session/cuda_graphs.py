"""A frame's work on a GPU as two CUDA graphs: the image encoder, and everything behind it.

Launching a graph costs the processor some microseconds where launching its kernels one by one costs milliseconds. A graph
is a recording of kernels on fixed memory, so each shape has its own; expressions and words are padded up to a few numbers
of them, which changes no valid result (docs/design.md, "Words and shapes").
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.features import ImageFeatures, MaskOutput, TextPrompt
from refsam_kernels import Fingerprint

if TYPE_CHECKING:
    from refsam.model import PromptedSAM

EXPRESSIONS = (1, 2, 4, 8, 16)
WORDS = (4, 8, 16, 32, 64)
_WARM_UP_CALLS = 3  # kernels are compiled and tuned, libraries take their workspaces

Function = Callable[..., tuple[Tensor, ...]]
Key = tuple[Hashable, Hashable, Hashable]  # the function, what it depends on, its inputs' shapes


class FrameGraphs:
    """Runs a model's `encode_image` and `decode` by CUDA graphs, with the same results.

    A graph is recorded for each new shape; the least recently used ones are dropped. Larger inputs (more than 16
    expressions or 64 words) run kernel by kernel. Threads may share one object.

    Args:
        model: a `RefSAM` or `EVFSAM` in evaluation mode on a CUDA device.
        capacity: number of graphs to keep.

    Raises:
        ValueError: the model is not on a CUDA device.
    """

    def __init__(self, model: "PromptedSAM", capacity: int = 8) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"model: got one on {model.device}, want one on a CUDA device")
        self.model = model
        self._weights = WeightsWatch(model)
        self._graphs = GraphCache(capacity)

    @property
    def memory_bytes(self) -> int:
        """Device memory that the graphs hold: inputs, outputs and intermediate tensors."""
        return self._graphs.memory_bytes

    @property
    def count(self) -> int:
        """Number of graphs."""
        return self._graphs.count

    def encode_image(self, pixels: Tensor, view: Tensor | None = None) -> ImageFeatures:
        """As `PromptedSAM.encode_image`."""
        patch_size = self.model.config.image_encoder.patch_size
        grid = pixels.shape[2] // patch_size, pixels.shape[3] // patch_size

        def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
            return _tensors(self.model.encode_image(*inputs))

        inputs = [pixels] if view is None else [pixels, view]
        return _features(grid, *self._graphs.run("encode", self._state(), encode, inputs))

    def decode(
        self,
        image: ImageFeatures,
        text: TextPrompt,
        image_index: Tensor | None = None,
        track: Tensor | None = None,
        track_valid: Tensor | None = None,
    ) -> MaskOutput:
        """As `PromptedSAM.decode`."""
        count, words = len(text), text.words.shape[1]
        if count > EXPRESSIONS[-1] or words > WORDS[-1] or count == 0:
            return self.model.decode(image, text, image_index, track, track_valid)
        inputs = pad_expressions(
            text,
            image_index,
            track,
            track_valid,
            at_least(EXPRESSIONS, count),
            at_least(WORDS, words),
        )

        def decode(*inputs: Tensor) -> tuple[Tensor, ...]:
            features = _features(image.grid, *inputs[:-6])
            words, sentence, lengths, index, track, valid = inputs[-6:]
            prompt = _FixedPrompt(words, sentence, lengths)
            return self.model.decode(features, prompt, index, track, valid)

        found = self._graphs.run(
            ("decode", image.grid), self._state(), decode, [*_tensors(image), *inputs]
        )
        return MaskOutput(*(tensor[:count] for tensor in found))

    def _state(self) -> Hashable:
        """The state that a recording depends on besides its inputs: weights, packing and autocast."""
        encoder = self.model.image_encoder
        return (
            self._weights.changes(),
            id(encoder.packing),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
        )


def _tensors(image: ImageFeatures) -> tuple[Tensor, ...]:
    """The levels and the other maps, an empty tensor for each that the model does not have."""
    others = (image.patches, image.fine, image.names)
    return image.levels, *(image.levels.new_empty(0) if map_ is None else map_ for map_ in others)


def _features(grid: tuple[int, int], levels: Tensor, *others: Tensor) -> ImageFeatures:
    """The inverse of `_tensors`."""
    given = (map_ if map_.numel() else None for map_ in others)
    return ImageFeatures(levels[0], levels, grid, *given)


class WeightsWatch:
    """Counts the changes of a model's weights, without walking through its modules each time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._fingerprint = Fingerprint()
        self._count = 0
        self._key: Hashable = None
        self._walk()

    def changes(self) -> int:
        """Number of changes so far: weights changed in place or replaced, modules replaced or added."""
        if any(tuple(found.values()) != known for found, known in self._children):
            self._walk()
        parameters = (p for owner in self._owners for p in owner.values() if p is not None)
        key = self._fingerprint(parameters)
        if key != self._key:
            self._key, self._count = key, self._count + 1
        return self._count

    def _walk(self) -> None:
        """Remembers where the parameters stand, and which modules there are."""
        modules = list(self._model.modules())
        self._owners = [module._parameters for module in modules]
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules]


class _FixedPrompt(TextPrompt):
    """Prompts that are not trimmed: lengths change between replays, and reading them would stall the stream."""

    def __post_init__(self) -> None:
        pass


def at_least(sizes: Sequence[int], wanted: int) -> int:
    """The smallest of these ascending sizes that is not below the wanted one."""
    return next(size for size in sizes if size >= wanted)


def pad_expressions(
    text: TextPrompt,
    image_index: Tensor | None,
    track: Tensor | None,
    track_valid: Tensor | None,
    count: int,
    words: int,
) -> list[Tensor]:
    """Inputs of `PromptedSAM.decode` for `count` expressions of up to `words` words, none of them None.

    Padding expressions have one word, zeros, no track, and look at the first frame.

    Returns:
        words (count, words, C), sentence (count, C), lengths (count,), image_index (count,), track (count, C),
        track_valid (count,) bool.
    """
    more = count - len(text)
    if track is None:
        track, track_valid = torch.zeros_like(text.sentence), torch.zeros_like(text.lengths).bool()
    elif track_valid is None:
        track_valid = torch.ones_like(text.lengths).bool()
    index = torch.zeros_like(text.lengths) if image_index is None else image_index
    return [
        F.pad(text.words, (0, 0, 0, words - text.words.shape[1], 0, more)),
        F.pad(text.sentence, (0, 0, 0, more)),
        F.pad(text.lengths, (0, more), value=1),
        F.pad(index, (0, more)),
        F.pad(track.to(text.sentence.dtype), (0, 0, 0, more)),
        F.pad(track_valid, (0, more)),
    ]


@dataclass(frozen=True)
class _Graph:
    """A recording, the tensors it reads and writes, and an event recorded after its last results were copied."""

    graph: Any
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    memory_bytes: int
    taken: Any


class GraphCache:
    """Functions of tensors as CUDA graphs, the least recently used dropped beyond `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        """Device memory that the graphs hold."""
        return sum(graph.memory_bytes for graph in self._graphs.values())

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def run(
        self, name: Hashable, state: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the function by a graph for these shapes; the results are copies that the caller owns.

        Args:
            name: identifies the function.
            state: everything else that it depends on; graphs of another state are dropped.
            function: tensors to tensors, without looking at values.
            inputs: on one CUDA device.
        """
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        key = (name, state, shapes)
        device = device_of(inputs)
        with self._lock, torch.cuda.device(device):
            if key not in self._graphs:
                self._make_room(name, state)
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                self._graphs[key] = _record(function, inputs, self._streams[device])
            self._graphs.move_to_end(key)
            return _replay(self._graphs[key], inputs)

    def _make_room(self, name: Hashable, state: Hashable) -> None:
        for key in [key for key in self._graphs if key[0] == name and key[1] != state]:
            del self._graphs[key]
        while len(self._graphs) >= self.capacity:
            self._graphs.popitem(last=False)


def device_of(inputs: Sequence[Tensor]) -> torch.device:
    """The GPU that a function's inputs lie on."""
    return inputs[0].device


def _record(function: Function, inputs: Sequence[Tensor], stream: torch.cuda.Stream) -> _Graph:
    """Captures on the stream, one of the current device. Other threads may upload and allocate meanwhile."""
    device = device_of(inputs)
    fixed = [tensor.clone() for tensor in inputs]
    main = torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with _no_cached_casts():
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(*fixed)
        main.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function(*fixed)
    memory = pool_bytes(graph) + sum(tensor.nbytes for tensor in fixed)
    return _Graph(graph, fixed, tuple(outputs), memory, torch.cuda.Event())


def pool_bytes(graph: Any) -> int:
    """Device memory of a graph's own pool; other threads may allocate and free meanwhile."""
    pool = tuple(graph.pool())
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)


def _replay(recorded: _Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    stream = torch.cuda.current_stream(device_of(inputs))
    stream.wait_event(recorded.taken)  # another thread's stream may still read the results
    for fixed, given in zip(recorded.inputs, inputs, strict=True):
        fixed.copy_(given)
    recorded.graph.replay()
    outputs = tuple(tensor.clone() for tensor in recorded.outputs)
    recorded.taken.record(stream)
    return outputs


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Autocast would keep the casts of the warm-up, which the graph could then not rely on."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
