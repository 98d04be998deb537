"""What may know a batch's log-probs already: the batch itself, the user, the store."""
