"""Text encoders: what they refuse, what they remember, and that padding reaches nothing."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch

from refsam.errors import ExpressionError, UserError
from refsam.model.pretrained_text_encoder import RobertaTextEncoder, T5TextEncoder
from refsam.model.text_encoder import (
    EncodedText,
    SmallTextEncoder,
    place_behind,
    word_tokenizer,
)

WORDS = "the a of on in left red blue dark dog cat ball backpack person".split()


def build_encoder(seed: int = 0) -> SmallTextEncoder:
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS)
    encoder = SmallTextEncoder(tokenizer, width=32, depth=2, num_heads=4, mlp_dim=64, max_words=8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def test_tokens_lengths_and_unknown_words() -> None:
    encoded = build_encoder()(["the red dog", "cat"])
    assert encoded.tokens.shape == (2, 3, 32)
    assert encoded.lengths.tolist() == [3, 1] and encoded.unknown == ((), ())


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The RED dog!", "the red dog"),
        ("the red, dog.", "the red dog"),
        ("the dog's ball", "the dog ball"),
        ("dark-red ball", "dark red ball"),
        ("  red\tdog ", "red dog"),
        ("réd dog", "red dog"),
    ],
)
def test_case_accents_and_punctuation_do_not_matter(text: str, same: str) -> None:
    encoder = build_encoder()
    assert encoder.tokenize(text)[0] == encoder.tokenize(same)[0]
    assert encoder.tokenize(text)[1] == ()


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("On the left, the dog", "the dog on the left"),
        ("From the left: the red ball", "the red ball from the left"),
        ("on the left of the ball the dog", "the dog on the left of the ball"),
        ("in the left a dog on the ball", "a dog on the ball in the left"),
    ],
)
def test_a_place_that_stands_first_is_read_behind_the_thing(text: str, same: str) -> None:
    encoder = build_encoder()
    assert encoder.tokenize(text)[0] == encoder.tokenize(same)[0]


@pytest.mark.parametrize(
    "text", ["on the left of the ball", "on the left", "of", "the dog on a cat"]
)
def test_what_has_no_place_first_keeps_its_order(text: str) -> None:
    assert place_behind(text.split()) == text.split()


def test_unknown_words_are_named_and_the_others_used() -> None:
    encoded = build_encoder()(["the zorgish dog", "red cat"])
    assert encoded.unknown == (("zorgish",), ())
    assert encoded.lengths.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("the zorg of quux", "no word is known: zorg, quux"),
        ("on the", "no word names an object"),
        ("!!!", "no word names an object"),
        ("", "at least one word"),
        ("   ", "at least one word"),
        ("red " * 9, "got 9 words, wanted at most 8"),
    ],
)
def test_refuses_what_it_cannot_understand(expression: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        build_encoder()(["red dog", expression])


@pytest.mark.parametrize("expressions", [[], "red dog", [None]])
def test_refuses_other_things_than_a_list_of_expressions(expressions: object) -> None:
    with pytest.raises(ExpressionError, match="wanted"):
        build_encoder()(expressions)  # type: ignore[arg-type]


@torch.no_grad()
def test_another_batch_changes_at_most_rounding() -> None:
    encoder = build_encoder()
    alone = encoder.encode(["red dog"]).tokens[0]
    together = encoder.encode(["the red ball on the left", "red dog"]).tokens[1, :2]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_word_order_matters() -> None:
    encoded = build_encoder()(["red dog blue cat", "blue dog red cat"])
    assert not torch.allclose(encoded.tokens[0, 0], encoded.tokens[1, 2], atol=1e-2)


@torch.no_grad()
def test_what_was_encoded_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, asked = build_encoder(), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: asked.append(list(texts)) or encode(texts))
    first = encoder(["red dog", "cat"])
    again = encoder(["cat", "blue ball", "red dog"])
    assert asked == [["red dog", "cat"], ["blue ball"]]
    assert torch.equal(again.tokens[2, :2], first.tokens[0])
    assert torch.equal(again.tokens[0, :1], first.tokens[1, :1])


@torch.no_grad()
def test_new_weights_forget_what_was_remembered() -> None:
    encoder, other = build_encoder(0), build_encoder(1)
    before = encoder(["red dog"]).tokens
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder(["red dog"]).tokens, other(["red dog"]).tokens)
    encoder.norm.bias.add_(1)
    after = encoder(["red dog"]).tokens
    torch.testing.assert_close(after, other(["red dog"]).tokens + 1)
    assert not torch.equal(before, after)


def test_training_is_never_served_from_memory() -> None:
    encoder = build_encoder()
    with torch.inference_mode():
        encoder(["red dog"])
    assert encoder(["red dog"]).tokens.requires_grad
    encoder.requires_grad_(False)
    remembered = encoder(["red dog"]).tokens
    assert not remembered.is_inference() and not remembered.requires_grad


def test_works_with_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        encoder = build_encoder()
        assert encoder(["red dog"]).tokens.shape == (1, 2, 32)


@torch.no_grad()
def test_memory_is_bounded_and_copies_start_empty() -> None:
    encoder = build_encoder()
    encoder.cache_size = 3
    for word in ("dog", "cat", "ball", "person", "backpack"):
        encoder([word])
    assert len(encoder._cache) == 3
    for duplicate in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert len(duplicate._cache) == 0
        assert torch.equal(duplicate(["dog"]).tokens, encoder(["dog"]).tokens)


@torch.no_grad()
def test_threads_may_share_an_encoder() -> None:
    encoder = build_encoder()
    wanted = {word: build_encoder().encode([word]).tokens for word in ("dog", "cat", "ball")}
    wrong: list[str] = []

    def ask() -> None:
        with torch.no_grad():
            for _ in range(10):
                encoder.clear_cache()
                wrong.extend(w for w in wanted if not torch.equal(encoder([w]).tokens, wanted[w]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_encoded_text_is_trimmed_selected_and_joined() -> None:
    tokens = torch.randn(2, 6, 4)
    text = EncodedText(tokens, torch.tensor([2, 4]), (("x",), ()))
    assert text.tokens.shape == (2, 4, 4) and len(text) == 2
    joined = EncodedText.cat([text.select([0]), text])
    assert joined.lengths.tolist() == [2, 2, 4] and joined.unknown == (("x",), ("x",), ())
    assert torch.equal(joined.tokens[0, :2], tokens[0, :2])


@pytest.mark.parametrize("lengths", [[3], [0, 2], [1, 7]])
def test_encoded_text_rejects_impossible_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths"):
        EncodedText(torch.zeros(2, 6, 4), torch.tensor(lengths))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 with a word tokenizer, saved as `transformers` saves one."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(WORDS) + 2, dropout_rate=0.5, **sizes)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(WORDS), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_t5_masks_its_padding_and_stays_in_eval_mode(t5_folder: Path) -> None:
    encoder = T5TextEncoder(str(t5_folder), width=16)
    encoder.train()
    alone = encoder.encode(["red dog"])
    together = encoder.encode(["the red ball on the left", "red dog"])
    assert together.lengths.tolist() == [6, 2] and alone.tokens.shape == (1, 2, 16)
    torch.testing.assert_close(together.tokens[1, :2], alone.tokens[0], atol=1e-5, rtol=0)
    assert torch.equal(encoder.encode(["red dog"]).tokens, alone.tokens)


def test_t5_belongs_to_no_checkpoint_but_follows_the_dtype(t5_folder: Path) -> None:
    encoder = T5TextEncoder(str(t5_folder), width=16)
    assert encoder(["red dog"]).tokens.dtype == torch.float32
    assert not list(encoder.parameters()) and not encoder.state_dict()
    encoder.to(torch.float64)
    tokens = encoder(["red dog"]).tokens
    assert tokens.dtype == torch.float64 and not tokens.requires_grad


def test_t5_names_its_weights(t5_folder: Path) -> None:
    encoder = T5TextEncoder(str(t5_folder), width=16)
    source = encoder.source()
    assert source.name == str(t5_folder) and len(source.sha256 or "") == 64
    encoder.expected_sha256 = source.sha256
    encoder.load()
    other = T5TextEncoder(str(t5_folder), width=16)
    other.expected_sha256 = "0" * 64
    with pytest.raises(UserError, match="SHA-256"):
        other(["red dog"])


def test_t5_refuses_what_is_too_long_or_misfit(t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpressionError, match="got 513 tokens, wanted at most 512"):
        T5TextEncoder(str(t5_folder), width=16)(["red " * 513])
    with pytest.raises(UserError, match="got width 16, wanted 1024"):
        T5TextEncoder(str(t5_folder), width=1024)(["red dog"])
    with pytest.raises(UserError, match="cannot be loaded"):
        T5TextEncoder(str(tmp_path), width=16)(["red dog"])


def test_roberta(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=32, intermediate_size=16, **sizes)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(WORDS), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    encoded = RobertaTextEncoder(str(tmp_path), width=16)(["the red dog", "cat"])
    assert encoded.tokens.shape == (2, 3, 16) and encoded.lengths.tolist() == [3, 1]
