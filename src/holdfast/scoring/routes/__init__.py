"""The ways in which attention over rows of several sequences is computed: one class a file, and which is taken."""
