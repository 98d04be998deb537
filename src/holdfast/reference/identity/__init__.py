"""Which reference it is: everything that its log-probs depend on beside the token ids."""
