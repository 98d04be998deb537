"""Pairs of a run chosen by a margin: by which one, which of them, and the file that they are written to."""
