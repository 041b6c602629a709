"""The bottleneck that adapts a frozen ViT block."""

from torch import Tensor, nn
from torch.nn import functional as F

from refsam_kernels import AdapterWeights


class Adapter(nn.Module):
    """Two linear layers with a GELU between them (paper, section 3.2), zero at the start.

    The second layer starts at zero, so that an untrained RefSAM is SAM exactly.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(dim, hidden_dim)
        self.D_fc2 = nn.Linear(hidden_dim, dim)
        nn.init.zeros_(self.D_fc2.weight)
        nn.init.zeros_(self.D_fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim); the fused operators take `weights` instead."""
        return self.D_fc2(F.gelu(self.D_fc1(x)))

    @property
    def weights(self) -> AdapterWeights:
        """The four tensors as the operators of refsam_kernels take them."""
        return AdapterWeights(
            self.D_fc1.weight, self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias
        )
