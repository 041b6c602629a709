"""Hierarchical dense attention of pixels over words; see README.md."""

from refsam_kernels.dense_attention.op import dense_attention

__all__ = ["dense_attention"]
