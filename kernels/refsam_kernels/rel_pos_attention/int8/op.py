"""Registration of `rel_pos_attention_int8`, which the public function calls with `int8_scores`."""

from torch import Tensor

from refsam_kernels.core.flops import counts
from refsam_kernels.core.registration import Operator, needs_gradient
from refsam_kernels.rel_pos_attention.inputs import Inputs, count_products

operator = Operator(
    "rel_pos_attention_int8", Inputs, package="refsam_kernels.rel_pos_attention.int8"
)


@operator.forward
def _forward(inputs: Inputs) -> Tensor:
    images, h, w, width = inputs.qkv.shape
    return inputs.qkv.new_empty(images, h, w, width // 3)


counts(operator)(count_products)


def attend(inputs: Inputs, backend: str) -> Tensor:
    """Output (B, h, w, D). Raises RuntimeError if autograd would record the call."""
    if needs_gradient(*inputs[:4]):
        raise RuntimeError(
            "rel_pos_attention: got int8_scores with tensors that require gradients, wanted a call under "
            "torch.no_grad() or torch.inference_mode(): it has no backward"
        )
    return _forward(*inputs, backend)
