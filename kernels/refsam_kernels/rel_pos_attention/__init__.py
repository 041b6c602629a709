"""SAM's attention with decomposed relative positions, global and in windows; see README.md."""

from refsam_kernels.rel_pos_attention.op import rel_pos_attention

__all__ = ["rel_pos_attention"]
