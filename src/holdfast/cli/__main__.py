"""The command `holdfast`, also as `python -m holdfast.cli`, which `accelerate launch -m` and `torchrun -m` start."""

from holdfast.interruption import handled, wait


def main() -> None:
    """Runs the command line. A signal that comes while modules are imported waits for the command to begin."""
    with handled():
        wait()
        from holdfast.cli.app import app

        app()


if __name__ == "__main__":
    main()
