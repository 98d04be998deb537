"""What holdfast adds to a checkpoint: the reference, and digests of all files, written, checked and read again.

`files` (sizes and digests), `foreign` (who wrote one without a record) <- `manifest` (what is complete) <- `sound`
(what is damaged, and the way on) <- `training_state` (what starts afresh) <- `reference_state` (the folder
`reference/`, with its `provenance`) <- `folder` (checkpoints written and deleted) <- `whole`, `parts` (weights spread
over processes) <- `policy_state` (the policy loaded and compared) <- `policy_base` (what it computes with besides),
`engine` (who goes on from whose), `template_date`, `finite` (nothing NaN is saved), `learning_rate` (of a resumed run),
`adoption` (of one that another trainer wrote).
`disk_error`, `placed`, `shared_folder`: whatever a run writes is whole or not there.
"""
