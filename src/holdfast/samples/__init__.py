"""Completions of held-out prompts by the policy and by its reference, side by side.

`prompts` says which prompts, `greedy` completes them, and `sampler` knows what was completed already. `tables` shows
samples in trackers, and `win_rate` has a judge compare them. What was generated is in the run's record
(`holdfast.record`).
"""
