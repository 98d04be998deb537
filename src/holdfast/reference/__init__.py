"""Where the reference is held, when it is asked, and whether it moves: one way per file."""
