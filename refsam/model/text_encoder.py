"""Text encoders: expressions in, one vector per word out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from refsam.checkpoint import Source
from refsam.errors import ExpressionError
from refsam_kernels import Fingerprint, settle

UNKNOWN = "[UNK]"
PADDING = "[PAD]"

FUNCTION_WORDS = frozenset(
    "a an the this that these those of on in at to by for from with without and or is are was be "
    "it its there here which who whom whose what as some any one ones please".split()
)
"""Words that name nothing: an expression in which no other word is known cannot be understood."""

_PREPOSITIONS = frozenset("of on in at to by for from with near behind beside above below".split())
_DETERMINERS = frozenset("the a an that this these those all every each any".split())

DEFAULT_WORDS = tuple(
    "the a an of on in at to by with and that is "
    "red green blue yellow orange purple pink brown black white grey gray cyan magenta "
    "light dark big large small little tiny left right top bottom middle upper lower first last "
    "circle square triangle star ring cross heart ball block box disc shape object thing "
    "person man woman child boy girl dog cat horse bird car bus bike boat cup bottle bag backpack "
    "ball chair table book phone hat shirt shoe tree flower".split()
)
"""The vocabulary of an untrained encoder that was given no tokenizer."""


@dataclass(frozen=True)
class EncodedText:
    """A text encoder's output for P expressions: what a cache keeps.

    tokens (P, T, Ct) float; the first lengths[i] of row i are valid, the rest is padding and may
    hold anything. lengths (P,) int64 stays on the host. unknown: per expression, the words that the
    encoder does not know. Tokens are trimmed to the longest row.
    """

    tokens: Tensor
    lengths: Tensor
    unknown: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        lengths = self.lengths.cpu()
        if self.tokens.ndim != 3 or lengths.shape != self.tokens.shape[:1]:
            raise ValueError(
                f"tokens, lengths: got shapes {tuple(self.tokens.shape)} and "
                f"{tuple(lengths.shape)}, wanted (P, T, Ct) and (P,)"
            )
        if (
            len(lengths)
            and not 1 <= int(lengths.min()) <= int(lengths.max()) <= self.tokens.shape[1]
        ):
            raise ValueError(
                f"lengths: got {lengths.tolist()}, wanted 1 to T = {self.tokens.shape[1]}"
            )
        longest = int(lengths.max()) if len(lengths) else 0
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "tokens", self.tokens[:, :longest])
        object.__setattr__(self, "unknown", tuple(self.unknown) or ((),) * len(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Sequence[int]) -> EncodedText:
        """The expressions with these indices, in this order."""
        picked = list(indices)
        unknown = tuple(self.unknown[index] for index in picked)
        return EncodedText(self.tokens[picked], self.lengths[picked], unknown)

    @staticmethod
    def cat(parts: Sequence[EncodedText]) -> EncodedText:
        """One batch out of several, padded with zeros to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)
        tokens = [F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts]
        unknown = tuple(words for part in parts for words in part.unknown)
        return EncodedText(torch.cat(tokens), torch.cat([part.lengths for part in parts]), unknown)


def explain_unknown(expression: str, words: Sequence[str]) -> str:
    """One line, without a full stop: which words of an expression are unknown, and that the others are used."""
    named = ", ".join(f"'{word}'" for word in words)
    return (
        f"the model does not know {named} in '{expression}'; it looks for what the other words say"
    )


@torch.no_grad()
def refused_expressions(
    encode: Callable[[list[str]], object], expressions: Iterable[str]
) -> dict[str, str]:
    """The expressions for which `encode`, that of a model or a text encoder, raises ExpressionError, each with the reason."""
    refused = {}
    for expression in dict.fromkeys(expressions):
        try:
            encode([expression])
        except ExpressionError as error:
            refused[expression] = str(error)
    return refused


class CachedTextEncoder(nn.Module):
    """Checks expressions and caches their encodings.

    A subclass implements `encode`, and `weights_key` if its weights are no parameters. `kept`, if set, looks up earlier
    encodings elsewhere, such as on a disk. The cache is used only without gradients; it is keyed by the weights' `Fingerprint`
    and emptied by `load_state_dict`.
    """

    cache_size = 1024
    expected_sha256: str | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._fingerprint = Fingerprint()
        self._cache: OrderedDict[Hashable, EncodedText] = OrderedDict()
        self._lock = threading.Lock()
        self.kept: Callable[[str], EncodedText | None] | None = None
        self.register_load_state_dict_post_hook(_forget)

    def encode(self, expressions: Sequence[str]) -> EncodedText:
        """Encode without looking at the cache."""
        raise NotImplementedError

    def weights_key(self) -> Hashable:
        """A value that changes whenever the weights do."""
        return self._fingerprint(self.parameters())

    def source(self) -> Source | None:
        """The file that the weights come from, for an encoder that no checkpoint holds."""
        return None

    def clear_cache(self) -> None:
        """Forget every encoded expression."""
        with self._lock:
            self._cache.clear()

    def forward(self, expressions: Sequence[str]) -> EncodedText:
        """P expressions to their tokens (P, T, Ct).

        Raises ExpressionError for an expression that is empty, too long or not understood.
        """
        if isinstance(expressions, str) or not expressions:
            raise ExpressionError(f"expressions: got {expressions!r}, wanted a list of expressions")
        for expression in expressions:
            if not isinstance(expression, str) or not expression.strip():
                raise ExpressionError(f"expression: got {expression!r}, wanted at least one word")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self.encode(expressions)
        return EncodedText.cat(self._cached(list(expressions)))

    def _cached(self, expressions: list[str]) -> list[EncodedText]:
        weights = self.weights_key()
        with self._lock:
            keys = {text: (text, weights) for text in expressions}
            found = {text: self._cache[key] for text, key in keys.items() if key in self._cache}
        if self.kept is not None:
            stored = {text: self.kept(text) for text in keys if text not in found}
            found |= {text: encoded for text, encoded in stored.items() if encoded is not None}
        missing = [text for text in keys if text not in found]
        if missing:
            # Tensors made in inference mode could never be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                encoded = self.encode(missing)
            settle(self.parameters())
            found |= {text: encoded.select([index]) for index, text in enumerate(missing)}
        with self._lock:
            for text, key in keys.items():
                self._cache[key] = found[text]
                self._cache.move_to_end(key)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return [found[text] for text in expressions]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave lock and cache behind."""
        state = self.__dict__.copy()
        del state["_lock"], state["_cache"]
        state["kept"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock, self._cache = threading.Lock(), OrderedDict()


def _forget(encoder: CachedTextEncoder, _: object) -> None:
    encoder.clear_cache()


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A tokenizer of whole words over this vocabulary: lower case, without punctuation.

    Identifiers follow the order of first appearance, after [PAD] (0) and [UNK] (1).
    """
    vocabulary = dict.fromkeys([PADDING, UNKNOWN, *(word.lower() for word in words)])
    identifiers = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(identifiers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"['’]s\b"), ""),
            normalizers.Replace(Regex(r"[^\w\s]|_"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def place_behind(words: list[str]) -> list[str]:
    """Move a leading phrase of place behind the noun: "on the left the dog" becomes "the dog on the left".

    Args:
        words: an expression's words in lower case.
    """
    if not words or words[0] not in _PREPOSITIONS:
        return words
    for index in range(2, len(words)):
        if words[index] in _DETERMINERS and words[index - 1] not in _PREPOSITIONS:
            return words[index:] + words[:index]
    return words


class TransformerLayer(nn.Module):
    """A pre-LayerNorm transformer layer whose keys can be masked."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor, is_valid: Tensor) -> Tensor:
        """(P, T, C) to the same; is_valid (P, T) bool says which words may be attended to."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_valid[:, None, None, :])
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SmallTextEncoder(CachedTextEncoder):
    """A small transformer over whole words, trained together with the model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        max_words: int,
        untaught: Iterable[str] = (),
    ) -> None:
        super().__init__(width)
        self.tokenizer = tokenizer
        self.max_words = max_words
        self.untaught = frozenset(untaught)
        self.words = nn.Embedding(tokenizer.get_vocab_size(), width)
        self.positions = nn.Parameter(torch.zeros(max_words, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, num_heads, mlp_dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.words.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def encode(self, expressions: Sequence[str]) -> EncodedText:
        """P expressions to tokens (P, T, width); words outside the vocabulary get the embedding of [UNK].

        Raises ExpressionError if an expression has too many words, or no word that names something
        the model was taught.
        """
        rows = [self.tokenize(expression) for expression in expressions]
        lengths = torch.tensor([len(identifiers) for identifiers, _ in rows])
        padded = pad_sequence([torch.tensor(identifiers) for identifiers, _ in rows], True)
        device = self.positions.device
        is_valid = (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
        x = self.words(padded.to(device)) + self.positions[: padded.shape[1]]
        for layer in self.layers:
            x = layer(x, is_valid)
        return EncodedText(self.norm(x), lengths, tuple(unknown for _, unknown in rows))

    def tokenize(self, expression: str) -> tuple[list[int], tuple[str, ...]]:
        """The identifiers of an expression's words, and the words that are not in the vocabulary or were not taught.

        Raises ExpressionError as `encode` does.
        """
        words = place_behind(self.tokenizer.normalizer.normalize_str(expression).split())
        if len(words) > self.max_words:
            raise ExpressionError(
                f"expression: got {len(words)} words, wanted at most {self.max_words}: "
                f"{expression!r}"
            )
        identifiers = self.tokenizer.encode(words, is_pretokenized=True).ids
        unknown_id = self.tokenizer.token_to_id(UNKNOWN)
        known = {
            word
            for word, identifier in zip(words, identifiers, strict=True)
            if identifier != unknown_id and word not in self.untaught
        }
        unknown = tuple(word for word in words if word not in known)
        if known <= FUNCTION_WORDS:
            named = ", ".join(unknown)
            reason = f"no word is known: {named}" if unknown else "no word names an object"
            raise ExpressionError(
                f"expression {expression!r}: {reason}; describe it in other words"
            )
        return identifiers, unknown
