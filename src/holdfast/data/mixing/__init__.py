"""Several datasets as one, and the source of each pair."""
