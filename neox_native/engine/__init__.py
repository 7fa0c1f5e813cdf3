"""A model on a mesh with the optimizer that owns it: built, and taken through one step."""
