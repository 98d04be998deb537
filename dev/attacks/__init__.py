"""Attacks on the command line: generated inputs and events, each of which must end in success or in one message."""
