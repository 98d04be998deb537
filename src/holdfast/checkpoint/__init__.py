"""What holdfast adds to a checkpoint: the reference and the policy's digest, written, checked and read again.

`provenance` (what the reference was made from) <- `reference_state` (the folder `reference/`) <- `folder` (complete
checkpoints) <- `policy_state` (the policy loaded and compared), `template_date`, `finite` (nothing NaN is saved),
`learning_rate` (of a resumed run).
"""
