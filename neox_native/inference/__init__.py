"""Using a trained model: load it onto a mesh, generate text, give tokens their probabilities."""
