"""`python -m holdfast.cli`, as `accelerate launch -m` and `torchrun -m` start it."""

from holdfast.cli.app import app

app()
