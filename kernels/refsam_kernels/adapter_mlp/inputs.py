"""The arguments and results of `adapter_mlp`."""

from typing import Any, NamedTuple

from torch import Tensor

from refsam_kernels.feed_forward.mlp import MLPWeights


class Inputs(NamedTuple):
    """The public function's arguments; `keep` asks for the values that the backward needs."""

    normed: Tensor
    residual: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    adapter_fc1_weight: Tensor | None
    adapter_fc1_bias: Tensor | None
    adapter_fc2_weight: Tensor | None
    adapter_fc2_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: float
    eps: float
    keep: bool

    @property
    def mlp(self) -> MLPWeights:
        """The MLP's weights."""
        return MLPWeights(*self[2:6])

    @property
    def adapter(self) -> MLPWeights | None:
        """The adapter's weights."""
        weights: tuple[Any, ...] = self[6:10]
        return None if self.adapter_fc1_weight is None else MLPWeights(*weights)


class Outputs(NamedTuple):
    """x and its layer norm; for the backward, the norm's statistics and the values that each MLP keeps.

    Unused tensors (no norm, no `keep`, no adapter) have no elements.
    """

    x: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor
    hidden: Tensor
    activated: Tensor
    adapter_hidden: Tensor
    adapter_activated: Tensor
