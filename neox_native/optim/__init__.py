"""The update rule around the weights: parameter groups, learning rate, loss scale."""
