"""The model that trains: loaded, made ready, and looked after during the run.

`load` and `tokenizer` read from a path. `prepare` adds the adapter and switches dropout off, with `adapters` and
`quantised`. `placement` and `broadcast` put models on the device, with the same weights in all processes.
`independence` and `rotations` make sure that a log-prob depends on its own row alone. `untouched` and `full_eval` put a
model back as it was. `malloc` keeps a CPU's freed memory.
"""
