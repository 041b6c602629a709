"""The arguments and results of `adapter_projection`."""

from typing import Any, NamedTuple

from torch import Tensor

from refsam_kernels.feed_forward.mlp import MLPWeights


class Inputs(NamedTuple):
    """The public function's arguments; `keep` asks for the values that the backward needs."""

    attention: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    adapter_fc1_weight: Tensor | None
    adapter_fc1_bias: Tensor | None
    adapter_fc2_weight: Tensor | None
    adapter_fc2_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    keep: bool

    @property
    def adapter(self) -> MLPWeights | None:
        """The adapter's weights."""
        weights: tuple[Any, ...] = self[4:8]
        return None if self.adapter_fc1_weight is None else MLPWeights(*weights)


class Outputs(NamedTuple):
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and its MLP's values.

    Tensors that are not kept have no elements.
    """

    x: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor
    projected: Tensor
    hidden: Tensor
    activated: Tensor
