"""Clips that refsam draws itself, with expressions and exact masks: what the bundled model is trained and measured on."""

from refsam.data.generated.clips import GeneratedBatch, GeneratedClip, generate_batch, generate_clip

__all__ = ["GeneratedBatch", "GeneratedClip", "generate_batch", "generate_clip"]
