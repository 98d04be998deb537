"""From files to batches: `load`, `formats`, `tokenize`, `prepare`, then a layout of `layouts`. Each does one step."""
