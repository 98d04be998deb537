"""What the options of a run may be: numbers, names, what contradicts what; the optimizer and schedule that they ask for
are tried on one number."""
