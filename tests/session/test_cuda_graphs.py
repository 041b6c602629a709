"""CUDA graphs give what the model gives: by a stand-in that records and replays on the CPU, and on a GPU where there is one."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refsam import RefSAM, VideoSession
from refsam.session import FrameGraphs
from refsam.session.cuda_graphs import WORDS, GraphCache, WeightsWatch, at_least, pad_expressions
from tests.session import cuda_stand_in
from tests.tiny_model import tiny_model

TEXTS = [
    "the red cup",
    "dog",
    "the person on the left of the green car",
    "a cat",
    "the big box",
    "tree",
]


@pytest.fixture(scope="module")
def model() -> RefSAM:
    return tiny_model().optimize()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_in.install(monkeypatch)


def frames(count: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 40, 56, 3), dtype=torch.uint8, generator=generator)
    return [*images.to(device)]


def graphs_of(model: RefSAM, monkeypatch: pytest.MonkeyPatch, capacity: int = 8) -> FrameGraphs:
    """Graphs of a model on the CPU, which the stand-in takes for a device."""
    with monkeypatch.context() as patch:
        patch.setattr(RefSAM, "device", torch.device("cuda", 0))
        return FrameGraphs(model, capacity)


def logits_of(session: VideoSession, images: list[Tensor]) -> Tensor:
    return torch.stack([session.step(image).logits for image in images])


# Padding, on any device


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_padded_expressions_and_words_change_no_mask(model: RefSAM, count: int) -> None:
    with torch.no_grad():
        pixels, _ = model.preprocess(frames(1)[0][None])
        image, text = model.encode_image(pixels), model.encode_text(TEXTS[:count])
        track = torch.randn(count, text.sentence.shape[1])
        valid = torch.arange(count) % 2 == 0
        plain = model.decode(image, text, None, track, valid)
        words, sentence, lengths, *rest = pad_expressions(text, None, track, valid, 8, 16)
        padded_text = type(text)(words, sentence, lengths)
        padded = model.decode(image, padded_text, *rest)
    assert len(padded.logits) == 8
    for ours, theirs in zip(padded, plain, strict=True):
        assert torch.isfinite(ours).all()
        assert torch.allclose(ours[:count], theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(padded.logits[:count] > 0, plain.logits > 0)


def test_no_track_is_a_track_that_does_not_count(model: RefSAM) -> None:
    with torch.no_grad():
        pixels, _ = model.preprocess(frames(1)[0][None])
        image, text = model.encode_image(pixels), model.encode_text(TEXTS[:2])
        words, sentence, lengths, *rest = pad_expressions(text, None, None, None, 2, 9)
        padded = model.decode(image, type(text)(words, sentence, lengths), *rest)
        plain = model.decode(image, text)
    assert torch.allclose(padded.logits, plain.logits, atol=1e-5)
    assert torch.allclose(padded.track_token, plain.track_token, atol=1e-5)


def test_buckets() -> None:
    assert [at_least(WORDS, count) for count in (1, 4, 5, 64)] == [4, 4, 8, 64]


# Recording and replaying, by the stand-in


def test_sessions_with_graphs_equal_those_without(
    model: RefSAM, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of(model, monkeypatch)
    images = frames(4)
    for count in (1, 3):
        expected = logits_of(VideoSession(model, TEXTS[:count]), images)
        session = VideoSession(model, TEXTS[:count], graphs=graphs)
        assert torch.allclose(logits_of(session, images), expected, atol=1e-5)
    assert graphs.count == 3  # the encoder; one expression; up to four
    assert 3 * 2**20 < graphs.memory_bytes < 4 * 2**20  # the graphs' own memory and their inputs


def test_expressions_come_and_go_between_replays(
    model: RefSAM, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, results = frames(5), []
    for graphs in (None, graphs_of(model, monkeypatch)):
        session = VideoSession(model, TEXTS[:3], graphs=graphs)
        found = [session.step(images[0]).logits]
        session.add(TEXTS[3])
        found.append(session.step(images[1]).logits)
        session.remove(0)
        found += [session.step(image).logits for image in images[2:]]
        results.append(torch.cat(found))
    assert torch.allclose(*results, atol=1e-5)


def test_what_has_no_graph_is_computed_without(
    model: RefSAM, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, texts = graphs_of(model, monkeypatch), TEXTS * 3
    expected = VideoSession(model, texts).step(frames(1)[0]).logits
    found = VideoSession(model, texts, graphs=graphs).step(frames(1)[0]).logits
    assert torch.equal(found, expected)
    assert graphs.count == 1


def test_new_weights_are_recorded_anew(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tiny_model(seed=1)
    graphs = graphs_of(mine, monkeypatch)
    session = VideoSession(mine, TEXTS[:1], graphs=graphs)
    session.step(frames(1)[0])
    mine.load_state_dict(tiny_model().state_dict())
    session.reset()
    found = session.step(frames(1)[0]).logits
    expected = VideoSession(tiny_model(), TEXTS[:1]).step(frames(1)[0]).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert graphs.count == 2  # those of the old weights are gone


def doubled(x: Tensor) -> tuple[Tensor, ...]:
    return (2 * x,)


def test_least_recently_used_graph_makes_room(cuda: None) -> None:
    cache, sizes = GraphCache(2), (1, 2, 1, 3)
    for size in sizes:
        given = torch.arange(float(size))
        (found,) = cache.run("double", None, doubled, [given])
        assert torch.equal(found, 2 * given)
    assert cache.count == 2
    assert cache.memory_bytes == 2 * 2**20 + 4 * (1 + 3)
    recorded: list[int] = []

    def noted(x: Tensor) -> tuple[Tensor, ...]:
        recorded.append(len(x))
        return doubled(x)

    cache.run("double", None, noted, [torch.zeros(1)])
    cache.run("double", None, noted, [torch.zeros(2)])
    assert set(recorded) == {2}  # 1 was used after 2


def test_results_are_the_callers_own(cuda: None) -> None:
    cache = GraphCache(1)
    first, second = (
        cache.run("double", None, doubled, [torch.full((2,), value)])[0] for value in (1.0, 5.0)
    )
    assert first.tolist() == [2, 2]
    assert second.tolist() == [10, 10]


def test_looking_at_values_would_be_noticed(cuda: None) -> None:
    look: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x * x.max().item(),)  # noqa: E731
    with pytest.raises(cuda_stand_in.CaptureError):
        GraphCache(1).run("look", None, look, [torch.ones(2)])


def test_a_second_gpus_work_is_captured_there(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream for captures belongs to the device that was current when it was first wanted."""
    cache, given = GraphCache(4), torch.arange(3.0)
    for index in (0, 1, 0):
        device = torch.device("cuda", index)
        monkeypatch.setattr("refsam.session.cuda_graphs.device_of", lambda inputs, d=device: d)
        monkeypatch.setattr(cuda_stand_in.STATE, "of_work", index)
        (found,) = cache.run(("double", index), None, doubled, [given])
        assert torch.equal(found, 2 * given)
    assert cache.count == 2


def test_other_threads_may_wait_and_allocate_during_a_capture(cuda: None) -> None:
    faults: list[Exception] = []

    def other() -> None:
        try:
            torch.cuda.Event().synchronize()
            torch.cuda.Stream().synchronize()
        except Exception as error:
            faults.append(error)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return doubled(x)

    GraphCache(1).run("double", None, function, [torch.ones(2)])
    assert not faults


def test_a_capture_that_forbids_it_would_be_noticed(cuda: None) -> None:
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(cuda_stand_in.CaptureError, match="global"),
    ):
        torch.cuda.Event().synchronize()


def test_changes_of_weights_are_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    watch = WeightsWatch(model)
    counts = [watch.changes(), watch.changes()]
    with torch.no_grad():
        model[0].weight.add_(1)
    counts.append(watch.changes())
    model[1].weight = torch.nn.Parameter(torch.ones(2, 2))
    counts.append(watch.changes())
    model[1] = torch.nn.Linear(2, 2)
    counts.append(watch.changes())
    model[1].append = torch.nn.Linear(2, 2)
    counts += [watch.changes(), watch.changes()]
    assert counts == [1, 1, 2, 3, 4, 5, 5]


def test_weights_are_found_without_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    watch = WeightsWatch(model)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("walks through the modules")

    monkeypatch.setattr(torch.nn.Module, "named_modules", refuse)
    assert watch.changes() == watch.changes()


def test_rejects_a_model_elsewhere_and_another_models_graphs(
    model: RefSAM, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="model: got one on cpu, want one on a CUDA device"):
        FrameGraphs(model)
    with pytest.raises(ValueError, match="graphs: got those of another model"):
        VideoSession(tiny_model(), graphs=graphs_of(model, monkeypatch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_equal_kernels_one_by_one(dtype: torch.dtype) -> None:
    model = tiny_model().to("cuda").optimize()
    graphs, images = FrameGraphs(model), frames(4, "cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        for count in (1, 3, 5):
            expected = logits_of(VideoSession(model, TEXTS[:count]), images)
            found = logits_of(VideoSession(model, TEXTS[:count], graphs=graphs), images)
            tolerance = 1e-4 if dtype == torch.float32 else 0.05
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert graphs.memory_bytes > 0
    result = VideoSession(model, TEXTS[:2], graphs=graphs).step(images[0])
    masks, scores = result.on_host()
    assert (masks == result.masks.cpu().numpy()).all()
    assert (scores == result.scores.cpu().numpy()).all()
