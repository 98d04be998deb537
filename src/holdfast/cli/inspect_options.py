"""The options of `holdfast inspect`: those for a run's pairs, and those for two models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.paths import path_option

_RUN, _MODELS = "A run's pairs", "Two models"


def _of_run(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_RUN, **more)


def _of_models(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_MODELS, **more)


def _file(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, parser=path_option, metavar="FILE", help=help, **more)


Target = Annotated[str, typer.Argument(metavar="RUN.YAML|MODEL", help="A run file; or, with --reference, a model.")]
Html = Annotated[Path | None, _file("--html", "Write all of it as one page.")]
Json = Annotated[Path | None, _file("--json", "Write all numbers as JSON.")]

Out = Annotated[
    Path | None,
    _of_run("--run", parser=path_option, metavar="OUT", help="Show what training did: a run's folder or checkpoint."),
]
Overrides = Annotated[
    list[str] | None, _of_run("--set", metavar="KEY=VALUE", help="Change one value: training.beta=0.2")
]
Dataset = Annotated[str | None, _of_run("--dataset", metavar="NAME", help="Only `train`, `eval`, or one of several.")]
NumPairs = Annotated[
    int | None, _of_run("--pairs", min=0, max=1000, help="Show the text of so many pairs of each kind (default 5).")
]
Csv = Annotated[Path | None, _file("--csv", "Write a line of numbers for every pair.", rich_help_panel=_RUN)]

Reference = Annotated[
    str | None,
    _of_models(
        "--reference", metavar="REF", help="The model to compare MODEL with; __base__ is the base of its adapter."
    ),
]
Data = Annotated[
    str | None, _of_models("--data", metavar="DATA", help="The pairs to compare on: a file, a folder or a hub id.")
]
Revision = Annotated[str | None, _of_models("--revision", help="The revision of MODEL on the hub.")]
ReferenceRevision = Annotated[str | None, _of_models("--reference-revision", help="The revision of REF on the hub.")]
Split = Annotated[str | None, _of_models("--split", help="The split of DATA.")]
Columns = Annotated[str | None, _of_models("--columns", help="The columns of DATA: a format, or a mapping as JSON.")]
Dtype = Annotated[
    str | None,
    _of_models("--dtype", help="float32, bfloat16, float16, or auto for each model's own (default float32)."),
]
Limit = Annotated[int | None, _of_models("--limit", min=1, help="Compare on so many pairs (default 64).")]
Seed = Annotated[int | None, _of_models("--seed", min=0, max=2**32 - 1, help="Draws these pairs (default 0).")]
MaxLength = Annotated[int | None, _of_models("--max-length", min=1, help="Most tokens of a row (default 1024).")]
Beta = Annotated[float | None, _of_models("--beta", help="Beta of the run that is meant (default 0.1).")]
Tolerance = Annotated[
    float | None, _of_models("--tolerance", help="A gap of so many nats in a token is no difference.")
]
WeightsOnly = Annotated[bool, _of_models("--weights-only", help="Compare weights and settings; run no model.")]
IgnoreTokenizer = Annotated[bool, _of_models("--ignore-tokenizer", help="Leave REF's tokenizer and template aside.")]
TrustRemoteCode = Annotated[bool, _of_models("--trust-remote-code", help="Let the models run code of their own.")]
