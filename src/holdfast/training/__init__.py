"""The base classes of `DPOTrainer`, and what happens before the first step.

Each class overrides the hooks of `transformers.Trainer` that concern one thing: `finite_trainer` numbers that
are not finite, `pair_trainer` batches of pairs,
`resumable_trainer` checkpoints, `hooked_trainer` what the methods of a subclass get (`handed_batches`, `signatures`),
`renewable_trainer` models that are made for each run (`makings`). `startup` chooses and checks the reference and the
layout; `step_record` finds the first step that was not finite.
"""
