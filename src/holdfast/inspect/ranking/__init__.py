"""What a model makes of preference pairs: which it ranks wrongly, what it takes to flip them, and where they moved."""
