"""Attention between tokens and image, either way; see README.md."""

from refsam_kernels.token_image_attention.op import AttentionWeights, token_image_attention

__all__ = ["AttentionWeights", "token_image_attention"]
