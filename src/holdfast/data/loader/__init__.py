"""The order in which pairs come, the rows that fill up last batches, and where in its data a run is."""
