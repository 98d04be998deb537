"""What computes the log-probs of a fixed reference: one way to hold it per file."""
