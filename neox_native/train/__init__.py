"""Training: build the pieces, run the steps, keep the run."""
