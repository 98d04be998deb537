"""Files of preferences -> datasets, read by our own rules, so that each fault is named with its file and line.

`json_rows`, `csv_rows` and `parquet_tables` read one file each. `contents` reads all files of a dataset once, finds the
types of their columns (`shapes`) and counts their rows. `builder` reads them again, into the cache of `datasets` or as
a stream. `folder` says which files of a folder belong to which split, `saved` loads what `save_to_disk` has
written, `splits` reads `train[:10%]`, `places` says which file and line a row comes from, and `faults` holds the words
for all of them.

Why not the readers of `datasets`: they infer the types of JSON from the first 10 MB. What comes later is cast, so that
messages in a column of text become text that looks like JSON. A text that is a date becomes a date, and a text "42"
beside messages becomes a number. Given up: the speed of their JSON reader, which is written in C++.
"""
