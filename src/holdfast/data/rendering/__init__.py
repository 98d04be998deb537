"""Conversations -> what the chat template makes of them, and what it leaves out."""
