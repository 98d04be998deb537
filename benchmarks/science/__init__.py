"""What research says about the reference, tried in a world where the best possible policy is known.

`python benchmarks/science/run.py` does all of it. `settings` (a world, its start policy, its pairs) <- `training` (a
run, and what is measured of it) and `statistics` (numbers over seeds, one rule for verdicts) <- `records` (what an
experiment is and what it found) <- `experiments` (which runs, what they say of which claim) <- `performing` (all runs,
kept as they finish), `page` (tables). `drawing` is how all pictures look.
"""
