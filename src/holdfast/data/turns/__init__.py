"""Which tokens of a conversation are scored: the assistant's turns, found in what the template made."""
