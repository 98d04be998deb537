"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.paths import path_option

RunFilePath = Annotated[
    Path,
    typer.Argument(parser=path_option, metavar="RUN.YAML", help="The run file; docs/cli.md describes it."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
