"""Clips that refsam draws itself, with expressions and exact masks. The bundled model is trained and measured on them."""

from refsam.data.generated.clips import GeneratedBatch, GeneratedClip, generate_batch, generate_clip

__all__ = ["GeneratedBatch", "GeneratedClip", "generate_batch", "generate_clip"]
