"""The model that trains: loaded, made ready, and looked after during the run.

`load`, `tokenizer` (from a path) -> `prepare` (adapter, dropout, what would not train) with `adapters` and `quantised`
-> `placement`, `broadcast` (device and processes). `independence` and `rotations` see to it that a log-prob depends on
its own row alone; `untouched` and `full_eval` put a model back as it was; `malloc` keeps a CPU's freed memory.
"""
