"""A run's data looked at before anything is loaded: `data.inspect_data` counts and collects, `lines` and `page` show.

What is counted (`pairs`, `facts`, `numbers`) knows nothing of how it is shown. What a model says of each pair
(`pair_numbers`) comes from the store, which `run_numbers` fills where it lacks something.
"""
