"""From files and rows to batches: load, read, tokenize, prepare, lay out. Each module does one of these."""
