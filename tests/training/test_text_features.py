"""A frozen text encoder's output is computed once, kept on disk, and never taken for another encoder's."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from refsam.checkpoint import Source
from refsam.model.pretrained_text_encoder import T5TextEncoder
from refsam.model.text_encoder import EncodedText, SmallTextEncoder, word_tokenizer
from refsam.training.loop import Trainer
from refsam.training.text_features import TextFeatures, identity
from tests.data import fixtures
from tests.training.runs import losses_of, ones_for_words, run_settings

TEXTS = ["the red dog", "cat", "the cat on the left"]


def build_encoder(seed: int = 0, words: str = "the red dog cat on left") -> SmallTextEncoder:
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words.split())
    encoder = SmallTextEncoder(tokenizer, width=16, depth=1, num_heads=2, mlp_dim=32, max_words=8)
    return encoder.eval().requires_grad_(False)


class Counting:
    """The encoder, and what it was asked."""

    def __init__(self, encoder: SmallTextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        encode = encoder.encode
        monkeypatch.setattr(
            encoder, "encode", lambda texts: (self.asked.extend(texts), encode(texts))[1]
        )


def test_another_run_reads_what_one_has_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_encoder()(TEXTS)
    first = TextFeatures(build_encoder(), tmp_path)(TEXTS)
    encoder = build_encoder()
    counting = Counting(encoder, monkeypatch)
    again = TextFeatures(encoder, tmp_path)(TEXTS)
    assert counting.asked == []
    assert again.lengths.tolist() == expected.lengths.tolist() == [3, 1, 5]
    assert torch.equal(first.tokens, again.tokens)
    for row, length in enumerate(expected.lengths.tolist()):
        torch.testing.assert_close(again.tokens[row, :length], expected.tokens[row, :length])
    assert not list(tmp_path.rglob("*.tmp"))


def test_bits_do_not_depend_on_the_rest_of_the_batch() -> None:
    alone = TextFeatures(build_encoder())(TEXTS[:1]).tokens[0]
    among = TextFeatures(build_encoder())(TEXTS).tokens[0, :3]
    assert torch.equal(alone, among)


def test_nothing_changes_under_autocast() -> None:
    plain = TextFeatures(build_encoder())(TEXTS).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TextFeatures(build_encoder())(TEXTS).tokens, plain)


def test_other_weights_and_other_words_have_other_folders() -> None:
    changed = copy.deepcopy(build_encoder())
    changed.norm.bias[0] += 1
    names = {identity(build_encoder()), identity(changed), identity(build_encoder(words="dog the"))}
    assert len(names) == 3 and identity(build_encoder()) in names


def test_a_damaged_file_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder()
    features = TextFeatures(encoder, tmp_path)
    expected = features(TEXTS).tokens
    path = features.file("cat")
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    encoder.clear_cache()
    counting = Counting(encoder, monkeypatch)
    assert torch.equal(TextFeatures(encoder, tmp_path)(TEXTS).tokens, expected)
    assert counting.asked == ["cat"] and path.read_bytes() == whole


def test_several_writers_at_once(tmp_path: Path) -> None:
    """Writers replace each other's files by equal ones: a reader finds a whole one at any time."""

    def encode(_: int) -> torch.Tensor:
        return TextFeatures(build_encoder(), tmp_path)(TEXTS).tokens

    build_encoder()  # seeds in turn below: all have the same weights
    encoders = [TextFeatures(build_encoder(), tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda features: features(TEXTS).tokens, encoders))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(TEXTS)
    assert not list(tmp_path.rglob("*.tmp"))


class Pretrained(T5TextEncoder):
    """T5's place, with weights in a file that this test writes."""

    loads = 0

    def _read(self) -> tuple[None, nn.Module]:
        self.loads += 1
        return None, nn.Linear(2, 2)

    def encode(self, expressions: list[str]) -> EncodedText:
        self.load()
        return ones_for_words(self, expressions)


def test_a_pretrained_encoder_is_told_by_its_file_and_not_loaded_for_what_is_there(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "t5/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    TextFeatures(Pretrained(str(weights.parent), 4), tmp_path / "cache")(TEXTS)
    again = Pretrained(str(weights.parent), 4)
    assert TextFeatures(again, tmp_path / "cache")(TEXTS).tokens.shape == (3, 5, 4)
    assert again.loads == 0
    weights.write_bytes(b"two")
    other = Pretrained(str(weights.parent), 4)
    TextFeatures(other, tmp_path / "cache")(TEXTS)
    assert other.loads == 1


def test_a_pretrained_encoder_without_a_single_file_is_told_by_its_weights() -> None:
    encoder = Pretrained("someone/some-t5", 4)
    encoder.source = lambda: Source("someone/some-t5")  # type: ignore[method-assign]
    encoder.load()
    name = identity(encoder)
    assert name.startswith("someone--some-t5-") and name == identity(encoder)
    with torch.no_grad():
        encoder.load()[1].bias[0] += 1
    assert identity(encoder) != name


def test_training_with_a_frozen_encoder_keeps_its_words(tmp_path: Path) -> None:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    model = run_settings(tmp_path, "x").model | {"frozen": True}
    plain = losses_of(Trainer(run_settings(tmp_path, "plain", model=model, validation={})))
    cache = {"text_cache": str(tmp_path / "cache"), "validation": {}}
    assert losses_of(Trainer(run_settings(tmp_path, "one", model=model, **cache))) == plain
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    trainer = Trainer(run_settings(tmp_path, "two", model=model, **cache))
    trainer.model.text_encoder.encode = None  # type: ignore[method-assign,assignment]
    assert losses_of(trainer) == plain
