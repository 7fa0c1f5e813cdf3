"""ZeRO: optimizer state, gradients and parameters, sharded over the ranks that would hold copies of them."""
