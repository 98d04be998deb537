"""The experiments, by name: to add one, write its module (see `records.Experiment`) and name it here."""

from science.experiments import beta, guides, hypo, selection, tr_dpo
from science.records import Experiment, as_experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.NAME: as_experiment(module) for module in (beta, tr_dpo, hypo, selection, guides)
}
