"""RefSAM: a frame and some expressions in, one mask per expression out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, PyTorchModelHubMixin
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from refsam import checkpoint
from refsam.checkpoint import Checkpoint, Source
from refsam.config import RefSAMConfig
from refsam.errors import CheckpointError
from refsam.model import build, model_card
from refsam.model.adapter import Adapter
from refsam.model.features import ImageFeatures, TextPrompt
from refsam.model.packing import PackedModule
from refsam.model.prompted_sam import DecodeInputs, PromptedSAM, Prompts, add_image
from refsam.model.text_encoder import CachedTextEncoder, EncodedText
from refsam.model.trunk_features import GREY

log = logging.getLogger(__name__)


class RefSAM(
    PromptedSAM,
    PyTorchModelHubMixin,
    library_name="refsam",
    license="apache-2.0",
    pipeline_tag="image-segmentation",
    paper_url="https://arxiv.org/abs/2307.00997",
    model_card_template=model_card.TEMPLATE,
):
    """Referring video object segmentation on SAM (arXiv 2307.00997).

    tokenizer is the vocabulary of the small text encoder; None gives a short list of common words.
    With `config.frozen` SAM's ViT and positional encoding and the text encoder do not train.
    """

    config: RefSAMConfig
    text_encoder: CachedTextEncoder

    def __init__(self, config: RefSAMConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.sources: dict[str, Source] = {}
        self.image_encoder = build.build_image_encoder(config)
        self.trunk = build.build_trunk(config)
        self.prompt_encoder = build.build_prompt_encoder(config)
        self.text_encoder = build.build_text_encoder(config, tokenizer)
        self.cross_modal_mlp = build.build_cross_modal_mlp(config)
        self.dense_attention = build.build_dense_attention(config)
        self.mask_decoder = build.build_mask_decoder(config)
        self.noun_match = build.build_noun_match(config)
        self.outlines = build.build_outline_head(config)
        self.tracking = build.build_tracking(config)
        self._set_pixel_statistics()
        if config.frozen:
            self.freeze_pretrained()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        sam: str | Path | None = None,
        text_encoder: str | None = None,
        image_size: int | None = None,
        **hub_options: Any,
    ) -> RefSAM:
        """Load the model, in eval mode, by bundled name (`nano`), folder or Hub id.

        sam: SAM's file or its converted folder for a delta, else looked for in REFSAM_SAM_DIR. text_encoder:
        folder or Hub id that replaces the recorded one. image_size: another S; position tables are
        interpolated. hub_options (revision, token, cache_dir, local_files_only, force_download) go to
        huggingface_hub. Raises CheckpointError or ConfigError.
        """
        return cls.from_checkpoint(
            checkpoint.load(
                name, sam=sam, text_encoder=text_encoder, image_size=image_size, **hub_options
            )
        )

    @classmethod
    def from_checkpoint(cls, stored: Checkpoint) -> RefSAM:
        """Build the model, in eval mode, from a checkpoint in memory; raises CheckpointError if names or shapes
        differ.

        A checkpoint of SAM alone gives an untrained RefSAM: the other parts are new.
        """
        if not isinstance(stored.config, RefSAMConfig):
            raise CheckpointError("checkpoint: got EVF-SAM, wanted RefSAM: use refsam.load_model")
        tokenizer = build.read_tokenizer(stored.tokenizer)
        with torch.device("meta"):
            model = cls(stored.config, tokenizer)
        expected = model.state_dict()
        untrained = [key for key in expected if not checkpoint.is_sam(key)]
        checkpoint.check_keys(stored.tensors, expected, untrained if stored.kind == "sam" else ())
        if stored.kind == "sam":
            log.warning("only SAM's parts are trained: %d tensors start anew", len(untrained))
            model = cls(stored.config, tokenizer)
        else:
            model.to_empty(device="cpu")
            model._set_pixel_statistics()
        model.load_state_dict(stored.tensors, strict=stored.kind != "sam")
        model.sources = dict(stored.sources)
        if "text_encoder" in stored.sources:
            model.text_encoder.expected_sha256 = stored.sources["text_encoder"].sha256
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        delta: bool = False,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        config: Any = None,
        **push_options: Any,
    ) -> str | None:
        """Write a checkpoint folder; with delta, only the tensors that SAM's file lacks, and that file's SHA-256.

        The other arguments are those of huggingface_hub's mixin; config is ignored, it is the model's own.
        model_card_kwargs: fields for `refsam.model.model_card` (model_name, training, results,
            limitations). Raises CheckpointError if the folder cannot be written or a delta does not know its SAM
        file; with push_to_hub as that does.
        """
        directory, stored = Path(save_directory), self.to_checkpoint(delta)
        checkpoint.write_checkpoint(directory, stored)
        if not (directory / "README.md").exists():
            arguments = model_card.card_arguments(stored) | (model_card_kwargs or {})
            self.generate_model_card(**arguments).save(directory / "README.md")
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or directory.name,
            delta=delta,
            model_card_kwargs=model_card_kwargs,
            **push_options,
        )

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        delta: bool = False,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload a RefSAM checkpoint",
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Upload a checkpoint with its model card to the Hugging Face Hub; returns the commit's address.

        delta: as for `save_pretrained`; the other arguments are those of huggingface_hub's mixin. Raises
        CheckpointError if the checkpoint cannot be written, or the Hub refuses it (no token, no right, no
        connection).
        """
        arguments = {"repo_id": repo_id, **(model_card_kwargs or {})}
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoint"
            self.save_pretrained(directory, delta=delta, model_card_kwargs=arguments)
            try:
                hub = HfApi(token=token)
                found = hub.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                return hub.upload_folder(
                    repo_id=found,
                    folder_path=directory,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
            # Its errors share no base: HTTP, validation, no token, no connection.
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                raise CheckpointError(
                    f"push_to_hub: {repo_id!r} cannot be written: {reason}"
                ) from None

    def to_checkpoint(self, delta: bool = False) -> Checkpoint:
        """The checkpoint that `save_pretrained` writes; raises CheckpointError for a delta without a known base."""
        tensors, sources = self.state_dict(), dict(self.sources)
        if delta:
            trained = [name for name, p in self.named_parameters() if p.requires_grad]
            if "sam" not in sources or any(checkpoint.is_base(name) for name in trained):
                raise CheckpointError(
                    "delta: wanted a model built on a recorded SAM file and left it as it was"
                )
            tensors = {key: value for key, value in tensors.items() if not checkpoint.is_base(key)}
        if source := self.text_encoder.source():
            sources["text_encoder"] = source
        tokenizer = getattr(self.text_encoder, "tokenizer", None)
        return Checkpoint(
            self.config,
            tensors,
            "delta" if delta else "full",
            tokenizer.to_str() if tokenizer is not None else None,
            sources,
        )

    def freeze_pretrained(self) -> None:
        """Train adapters, cross-modal MLP, dense attention, decoder and tracking only (section 3.2)."""
        self.requires_grad_(True)
        self.image_encoder.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        for module in self.image_encoder.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(True)
        self.train(self.training)

    def frozen_modules(self) -> list[nn.Module]:
        """Modules whose parameters are all frozen."""
        return [
            module
            for module in self.modules()
            if (parameters := list(module.parameters()))
            and not any(parameter.requires_grad for parameter in parameters)
        ]

    def train(self, mode: bool = True) -> RefSAM:
        """Set training mode; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.training = False
        return self

    def packed_parts(self) -> list[PackedModule]:
        """The trunk, if there is one."""
        return [] if self.trunk is None else [self.trunk]

    def encode_image(self, pixels: Tensor, view: Tensor | None = None) -> ImageFeatures:
        """Encode normalised pixels (B, 3, h, w), whole patches, into features that all expressions share; `view` is
        None."""
        seen = None
        if self.trunk is not None:
            scale, shift = self.pixel_std / GREY, (self.pixel_mean - GREY) / GREY
            seen = self.trunk(pixels * scale + shift)
        features, intermediates = self.image_encoder(pixels, seen.added if seen else None)
        more = [seen.level] if seen else []
        embedding = F.normalize(features.flatten(1, 2), dim=-1)
        levels = self.dense_attention.project(embedding, intermediates + more)
        grid = features.shape[1], features.shape[2]
        if seen is None:
            return ImageFeatures(levels[0], levels, grid)
        return ImageFeatures(levels[0], levels, grid, fine=seen.fine, names=seen.names)

    def encode_text(self, expressions: Sequence[str]) -> TextPrompt:
        """Encode P expressions as prompts; raises ExpressionError for one that has no known word."""
        return self.project_text(self.text_encoder(expressions))

    def project_text(self, encoded: EncodedText) -> TextPrompt:
        """The text encoder's output through the cross-modal MLP."""
        tokens = encoded.tokens.to(self.device, self.dtype)
        lengths = encoded.lengths.to(self.device, non_blocking=True)
        words, sentence = self.cross_modal_mlp(tokens, lengths)
        return TextPrompt(words, sentence, encoded.lengths, encoded.unknown)

    def text_source(self) -> Source | None:
        """See `PromptedSAM`."""
        return self.text_encoder.source()

    def forget_text(self) -> None:
        """See `PromptedSAM`."""
        self.text_encoder.clear_cache()

    def prompt(self, inputs: DecodeInputs) -> Prompts:
        """Words and track token as sparse prompts, dense attention as dense ones (paper, section 3)."""
        image, text, image_index, track, track_valid = inputs
        dense = self.dense_attention(
            image.levels,
            torch.cat([text.sentence[:, None], text.words], dim=1),
            text.lengths + 1,
            image_index,
        )
        sparse, lengths = text.words, text.lengths
        if track is not None:
            if track_valid is None:
                track_valid = torch.ones_like(lengths, dtype=torch.bool)
            track = torch.where(track_valid[:, None], track, 0.0).to(sparse.dtype)
            sparse, lengths = _append_token(sparse, lengths, track, track_valid)
        tokens, match = add_image(dense, image.embedding, image_index), None
        if self.noun_match is not None and image.names is not None:
            match = self.noun_match(text, image.names, image_index)
            tokens = tokens + match[..., None] * self.noun_match.prompt
        return Prompts(tokens, sparse, lengths, track, match)

    def next_track(self, object_token: Tensor, track: Tensor | None) -> Tensor:
        """The implicit tracking module (paper, section 3.5)."""
        return self.tracking(object_token, track)

    def refine(
        self, logits: Tensor, object_token: Tensor, inputs: DecodeInputs, match: Tensor | None
    ) -> Tensor:
        """Refine logits by the trunk's fine features and the noun's match; unchanged without a trunk."""
        image = inputs.image
        if self.outlines is None or image.fine is None or match is None:
            return logits
        match = match.unflatten(1, image.grid)
        return self.outlines(logits, match, object_token, image.fine, inputs.image_index)


def _append_token(
    words: Tensor, lengths: Tensor, token: Tensor, has_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Put token (P, C) right behind the valid words of (P, T, C), where has_token (P,) says so."""
    padded = F.pad(words, (0, 0, 0, 1))
    positions = torch.arange(padded.shape[1], device=words.device)
    is_place = (positions == lengths[:, None]) & has_token[:, None]
    return torch.where(is_place[..., None], token[:, None], padded), lengths + has_token
