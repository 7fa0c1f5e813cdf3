"""Weights in and out: Hugging Face folders and GPT-NeoX checkpoints."""
