"""Builds RefSAM's parts from a configuration: the only place in `refsam.model` that reads one."""

from dataclasses import asdict

from tokenizers import Tokenizer

from refsam.config import Beit3Config, EVFConfig, RefSAMConfig
from refsam.errors import CheckpointError
from refsam.model.beit3 import BEiT3
from refsam.model.cross_modal_mlp import CrossModalMLP
from refsam.model.dense_attention import HierarchicalDenseAttention
from refsam.model.detector import DETECTOR_CLASSES
from refsam.model.image_encoder import ImageEncoder
from refsam.model.mask_decoder import MaskDecoder, PromptEncoder
from refsam.model.noun_match import NounMatch
from refsam.model.outlines import OutlineHead
from refsam.model.pretrained_text_encoder import RobertaTextEncoder, T5TextEncoder
from refsam.model.text_encoder import (
    DEFAULT_WORDS,
    CachedTextEncoder,
    SmallTextEncoder,
    word_tokenizer,
)
from refsam.model.tracking import TrackingModule
from refsam.model.trunk_features import FINE_CHANNELS, NAME_CHANNELS, TrunkFeatures
from refsam.model.two_way_transformer import TwoWayTransformer


def build_image_encoder(config: RefSAMConfig | EVFConfig) -> ImageEncoder:
    """SAM's ViT with adapters."""
    sizes = config.image_encoder
    return ImageEncoder(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_dim=int(sizes.embed_dim * sizes.mlp_ratio),
        window_size=sizes.window_size,
        global_blocks=sizes.global_blocks,
        adapter_dim=int(sizes.embed_dim * sizes.adapter_ratio),
        output_dim=config.prompt_dim,
        crops=sizes.padding == "none",
    )


def build_trunk(config: RefSAMConfig) -> TrunkFeatures | None:
    """The MobileNetV2 beside SAM's ViT, None without a trunk."""
    sizes = config.image_encoder
    if not sizes.trunk_width:
        return None
    return TrunkFeatures(sizes.trunk_width, sizes.embed_dim, sizes.detector)


def build_outline_head(config: RefSAMConfig) -> OutlineHead | None:
    """The module that sharpens masks with the trunk's fine features, None without a trunk."""
    has_trunk = config.image_encoder.trunk_width
    return OutlineHead(config.prompt_dim, FINE_CHANNELS) if has_trunk else None


def build_noun_match(config: RefSAMConfig) -> NounMatch | None:
    """The module that compares words with the trunk's features, None without a trunk."""
    sizes = config.image_encoder
    if not sizes.trunk_width:
        return None
    classes = len(DETECTOR_CLASSES) if sizes.detector else 0
    return NounMatch(config.prompt_dim, NAME_CHANNELS, classes)


def build_prompt_encoder(
    config: RefSAMConfig | EVFConfig, with_dense: bool = False
) -> PromptEncoder:
    """SAM's image positional encoding and, with_dense, its dense prompt for the absence of a mask."""
    crops = config.image_encoder.padding == "none"
    return PromptEncoder(config.prompt_dim, with_dense, crops)


def read_tokenizer(text: str | None) -> Tokenizer | None:
    """The tokenizer of a `tokenizer.json`; raises CheckpointError if it is damaged."""
    if text is None:
        return None
    try:
        return Tokenizer.from_str(text)
    # tokenizers raises bare Exceptions.
    except Exception as error:
        raise CheckpointError(f"tokenizer.json: cannot be read ({error})") from None


def build_text_encoder(config: RefSAMConfig, tokenizer: Tokenizer | None) -> CachedTextEncoder:
    """The configured text encoder; only the small one takes a tokenizer."""
    sizes = config.text_encoder
    if sizes.kind == "small":
        return SmallTextEncoder(
            tokenizer or word_tokenizer(DEFAULT_WORDS),
            width=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            mlp_dim=int(sizes.width * sizes.mlp_ratio),
            max_words=sizes.max_words,
            untaught=sizes.untaught,
        )
    encoder = T5TextEncoder if sizes.kind == "t5" else RobertaTextEncoder
    return encoder(sizes.name, sizes.width, sizes.max_tokens)


def build_cross_modal_mlp(config: RefSAMConfig) -> CrossModalMLP:
    """The MLP between the text encoder and the prompts."""
    return CrossModalMLP(config.text_encoder.width, config.prompt_dim, config.cross_modal_layers)


def build_dense_attention(config: RefSAMConfig) -> HierarchicalDenseAttention:
    """Dense attention over the embedding and, if hierarchical, every intermediate map."""
    settings = config.dense_attention
    maps = len(config.image_encoder.global_blocks[:-1]) + bool(config.image_encoder.trunk_width)
    intermediates = maps if settings.hierarchical else 0
    return HierarchicalDenseAttention(
        config.prompt_dim,
        config.image_encoder.embed_dim,
        num_levels=1 + intermediates,
        learnable_scale=settings.learnable_scale,
        initial_scale=settings.initial_scale,
    )


def build_mask_decoder(config: RefSAMConfig | EVFConfig) -> MaskDecoder:
    """SAM's mask decoder."""
    sizes = config.mask_decoder
    transformer = TwoWayTransformer(
        sizes.depth, config.prompt_dim, sizes.num_heads, sizes.mlp_dim, sizes.downsample_rate
    )
    return MaskDecoder(config.prompt_dim, transformer, sizes.num_masks, sizes.iou_hidden_dim)


def build_tracking(config: RefSAMConfig) -> TrackingModule:
    """The implicit tracking module."""
    return TrackingModule(config.prompt_dim, config.tracking_hidden_dim)


def build_beit3(config: Beit3Config) -> BEiT3:
    """EVF-SAM's encoder of frame and expression."""
    return BEiT3(**asdict(config))
