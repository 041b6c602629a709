"""The attention stage's settings with what is compiled first: FlexAttention, and attention on augmented queries and keys."""

from benchmarks.gpu_report.rows import Rows
from benchmarks.gpu_report.tasks import attention


def run(rows: Rows, head_dim: str) -> None:
    """A row for each peer, setting and direction."""
    attention.run(rows, head_dim, of_peers=True)
