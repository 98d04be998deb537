"""A small model, preference pairs and a run file to try everything on, made on this machine in about a minute.

`village` (questions, answers, and which of two is better) <- `model` (tokenizer and model, trained from nothing) <-
`folder` (what is written). The command is `holdfast quickstart`.
"""
