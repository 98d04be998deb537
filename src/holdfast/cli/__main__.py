"""The command `holdfast`, also as `python -m holdfast.cli`, which `accelerate launch -m` and `torchrun -m` start."""

import warnings

from holdfast.interruption import handled, wait

_OF_LIBRARIES = "`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated"
"""peft reads names that transformers renames. The user of a command can do nothing about it."""


def main() -> None:
    """Runs the command line. A signal that comes while modules are imported waits for the command to begin."""
    warnings.filterwarnings("ignore", message=_OF_LIBRARIES, category=FutureWarning)
    with handled():
        wait()
        from holdfast.cli.app import app

        app()


if __name__ == "__main__":
    main()
