"""Log-probs on disk, stored once and found again by content. This room knows no model.

`key` says what a stored number was computed with, `manifest` writes that into a store's folder. `shard` is one file of
log-probs, `index` finds a completion in the shards, and `store` puts these together as `LogpStore`. `work_sharing`
fills a store with several processes and resumes a fill that crashed. `pair_shard` is a file of products of pairs, and
`pair_table` finds them. `maintenance` lists, verifies, merges and cleans up; `removal` says what may be removed.
`parquet` exports and imports, `exported` checks a file before it is taken, and `exported_pairs` takes products along.
`files` reads and writes files, `trust` says whose shards are used, `refusals` what a store says where it cannot go on,
and `processes` tells whether a process still runs.
"""
