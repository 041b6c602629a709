"""MLPs and sums with a layer norm, shared by `adapter_mlp` and `adapter_projection`."""
