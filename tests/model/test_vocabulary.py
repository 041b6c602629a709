"""A trained text encoder learns more words: the old ones mean what they meant."""

import pytest
import torch

from refsam.config import RefSAMConfig
from refsam.errors import ExpressionError
from refsam.model import RefSAM
from refsam.model.text_encoder import SmallTextEncoder, explain_unknown, word_tokenizer
from refsam.model.vocabulary import extend_vocabulary, mark_untaught
from tests.training.test_loop import TINY

OLD = "the a red dog cat".split()


def build_encoder() -> SmallTextEncoder:
    torch.manual_seed(0)
    return SmallTextEncoder(word_tokenizer(OLD), 32, 2, 4, 64, 8).eval()


def test_expressions_of_old_words_mean_the_same_bit_by_bit() -> None:
    encoder = build_encoder()
    texts = ["the red dog", "a cat"]
    before = encoder(texts).tokens
    identifiers = {word: encoder.tokenizer.token_to_id(word) for word in OLD}
    assert extend_vocabulary(encoder, ["puppy", "Dog", "swan", "puppy"]) == ["puppy", "swan"]
    assert torch.equal(encoder(texts).tokens, before)
    assert {word: encoder.tokenizer.token_to_id(word) for word in OLD} == identifiers
    assert encoder.words.weight.shape == (2 + 5 + 2, 32) and encoder.words.weight.requires_grad


def test_new_words_are_known_and_begin_near_their_relatives() -> None:
    encoder = build_encoder()
    assert encoder(["the red puppy"]).unknown == (("puppy",),)
    with pytest.raises(ExpressionError, match="puppy"):
        encoder(["the puppy"])
    extend_vocabulary(encoder, ["puppy", "zorg"], {"puppy": ("dog",), "zorg": ("nothing",)})
    assert encoder(["the puppy"]).unknown == ((),)
    row = {
        w: encoder.words.weight[encoder.tokenizer.token_to_id(w)] for w in ("puppy", "dog", "zorg")
    }
    assert 0 < (row["puppy"] - row["dog"]).norm() < 0.2 * row["dog"].norm()
    assert (row["zorg"] - encoder.words.weight[1]).norm() < 0.2 * encoder.words.weight[1].norm()


def test_nothing_new_changes_nothing() -> None:
    encoder = build_encoder()
    before = encoder.words.weight.clone()
    assert extend_vocabulary(encoder, OLD) == [] and torch.equal(encoder.words.weight, before)


def test_extended_model_is_saved_and_loaded(tmp_path) -> None:
    model = RefSAM(RefSAMConfig.from_dict(TINY), tokenizer=word_tokenizer(OLD)).eval()
    extend_vocabulary(model.text_encoder, ["puppy"])
    model.save_pretrained(tmp_path / "model")
    loaded = RefSAM.from_pretrained(str(tmp_path / "model")).eval()
    texts = ["the puppy", "the dog"]
    assert torch.equal(loaded.text_encoder(texts).tokens, model.text_encoder(texts).tokens)


def test_untaught_word_is_told_and_alone_refused(tmp_path) -> None:
    model = RefSAM(RefSAMConfig.from_dict(TINY), tokenizer=word_tokenizer([*OLD, "train"])).eval()
    before = model.encode_text(["the red train"])
    mark_untaught(model, ["train"])
    after = model.encode_text(["the red train"])
    assert (before.unknown, after.unknown) == (((),), (("train",),))
    assert torch.equal(before.words, after.words)  # its colour is looked for as before
    with pytest.raises(ExpressionError, match="no word is known: train"):
        model.encode_text(["the train"])
    model.save_pretrained(tmp_path / "model")
    loaded = RefSAM.from_pretrained(str(tmp_path / "model"))
    assert loaded.encode_text(["a red train"]).unknown == (("train",),)
    mark_untaught(loaded, [])
    assert loaded.encode_text(["the train"]).unknown == ((),)


def test_note_names_the_words_and_what_is_heeded() -> None:
    told = explain_unknown("the red backpack", ["backpack"])
    assert (
        told
        == "the model does not know 'backpack' in 'the red backpack'; it looks for what the other words say"
    )
