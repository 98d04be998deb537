"""The order in which pairs come, the rows that fill up last batches, batches read ahead, and a run's position in a
stream."""
