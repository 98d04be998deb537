"""Log-probs on disk, stored once and found again by content. This room knows no model.

`key` says what a stored number was computed with, `manifest` writes that into a store's folder. `shard` is one file of
log-probs, `index` finds a completion in the shards, and `store` puts these together as `LogpStore`. `work_sharing`
fills a store with several processes and resumes a fill that crashed. `maintenance` lists, verifies, merges and removes;
`parquet` exports and imports. `files` writes files in one piece, `processes` tells whether a process still runs.
"""
