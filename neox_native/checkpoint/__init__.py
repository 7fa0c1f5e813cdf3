"""Saving and loading the state of a run: complete or absent, in one format for every layout."""
