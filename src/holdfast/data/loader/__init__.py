"""The order in which pairs come, and what is known of where a run is in them."""
