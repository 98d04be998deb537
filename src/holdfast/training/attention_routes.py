"""The routes that attention over filled rows takes in a run: the same on all processes, and said in one line.

`scoring.routes.choice` chooses by the layer and the device. Once a layout was tried on the models of a run, what their
layers need is known. Then the routes that they will take are tried as well, in the dtype of the run, and a route that
fails on one process is taken by none: where weights are sharded, one log-prob is made by all of them.

Given up: routes of models that were not tried, such as under a user's own collator. Those are chosen when a layer is
called first. And dropout: a policy whose attention drops weights while it trains takes another route there.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from holdfast.agreement import of_all
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.routes import probes
from holdfast.scoring.routes.base import Route
from holdfast.scoring.routes.choice import ROUTES, routes_of


def dtype_of_run(model: nn.Module, accelerator: Accelerator) -> torch.dtype:
    """The dtype in which attention of the model is computed: autocast's, or that of its weights."""
    kind = accelerator.device.type
    with accelerator.autocast():
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def agreed_routes(models: Sequence[nn.Module], accelerator: Accelerator) -> dict[str, list[Route]]:
    """By the class of each model the routes of its attention layers; empty where there is nothing to choose from.

    Collective: a route that does not work on one process is refused on all.
    """
    device = accelerator.device
    dtypes = [dtype_of_run(model, accelerator) for model in models]
    while True:
        routes = [routes_of(unwrap(model), device, dtype) for model, dtype in zip(models, dtypes, strict=True)]
        own = {(ROUTES.index(route), dtype) for dtype, taken in zip(dtypes, routes, strict=True) for route in taken}
        asked = sorted(set().union(*of_all(own)), key=str)
        works = of_all([probes.works(ROUTES[number], device, dtype) for number, dtype in asked])
        refused = [pair for pair, of_each in zip(asked, zip(*works, strict=True), strict=True) if not all(of_each)]
        if not refused:
            return {type(unwrap(model)).__name__: taken for model, taken in zip(models, routes, strict=True) if taken}
        for number, dtype in refused:
            probes.refuse(ROUTES[number], device, dtype)


def line_about(routes: dict[str, list[Route]]) -> str:
    """One line: which routes attention takes, and in how many layers of which model where there are several."""
    names_of_all = {route.name for taken in routes.values() for route in taken}
    if len(names_of_all) == 1:
        return f"attention: {names_of_all.pop()}"
    of_each = [
        f"{model} " + ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))
        for model, names in ((model, [route.name for route in taken]) for model, taken in routes.items())
    ]
    return f"attention: {'; '.join(of_each)}"
