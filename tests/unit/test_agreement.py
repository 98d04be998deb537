"""Keys of a run file that contradict each other are refused before anything is loaded, each at its own line."""

import pytest

from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError

SETS = "{easy: e, hard: h}"
REFUSED = [  # data, other sections, training, the key at fault, what is said
    ("{train: t}", "", "eval_strategy: steps", "training.eval_strategy", "no"),
    ("{train: t}", "", "eval_on_start: true", "training.eval_on_start", "no"),
    ("{train: t}", "", "save_strategy: best, metric_for_best_model: loss", "training.save_strategy", "is 'best'"),
    ("{train: t}", "", "lr_scheduler_type: greedy, eval_strategy: steps", "training.eval_strategy", "no"),
    ("{train: t, eval: {}}", "", "", "data.eval", "is a mapping without datasets"),
    ("{train: t, eval: {easy: 3}}", "", "", "data.eval.easy", "must be a mapping of"),
    (
        f"{{train: t, eval: {SETS}}}", "", "eval_strategy: steps, metric_for_best_model: eval_loss",
        "training.metric_for_best_model", "`data.eval` has several sets.*for example, .*: easy_loss`",
    ),
    ("{train: {path: t, streaming: true}}", "", "", "training.max_steps", "is a stream, which has no length"),
    (
        "{train: {path: t, streaming: true}}", "", "max_steps: 3, ignore_data_skip: true",
        "training.ignore_data_skip", "is a stream, whose place",
    ),
    (
        "{train: {path: t, streaming: true}}", "", "max_steps: 3, train_sampling_strategy: group_by_length",
        "training.train_sampling_strategy", "is a stream, whose pairs come in its own order",
    ),
    ("{train: {}}", "", "", "data.train", "`data.train` is a mapping without datasets"),
    ("{train: {a: 3}}", "", "", "data.train.a", "`data.train.a` must be a mapping of"),
    ("{train: {a: {split: x}}}", "", "", "data.train.a", "`data.train.a` needs `path`; found split"),
    ("{train: {pth: x.jsonl}}", "", "", "data.train.pth", "`data.train.pth` is not a key .* Did you mean `path`"),
    ("{train: {a: {path: t, wieght: 2}}}", "", "", "data.train.a.wieght", "Did you mean `weight`"),
    ("{train: {path: t, weight: 2}}", "", "", "data.train.weight", "`data.train.weight` is the share of one"),
    ("{train: {a: {path: t, weight: -1}}}", "", "", "data.train.a.weight", "`data.train.a.weight`: .* found -1"),
    ("{train: {a: {path: t, weight: .nan}}}", "", "", "data.train.a.weight", "`data.train.a.weight`: .* found nan"),
    ("{train: {a: {path: t, weight: .inf}}}", "", "", "data.train.a.weight", "`data.train.a.weight`: .* found inf"),
    ("{train: {a: {path: t, weight: '2'}}}", "", "", "data.train.a.weight", "must be a number.* without quotes"),
    ("{train: {a: {path: t, weight: 50%}}}", "", "", "data.train.a.weight", "must be a number; found the string '50%'"),
    ("{train: {a: {path: t, weight: null}}}", "", "", "data.train.a.weight", "must be a number; found nothing"),
    ("{train: {a: {path: t, weight: true}}}", "", "", "data.train.a.weight", "must be a number; found the boolean"),
    ("{train: {a: {path: t, weight: 0}, b: {path: u, weight: 0}}}", "", "", "data.train", "all weights are 0"),
    ("{train: {a: {path: t, weight: 1}, b: u}}", "", "", "data.train.b", "'b' has no weight, and others have"),
    ("{train: t, eval: {a: {path: t, weight: 1}}}", "", "", "data.eval.a.weight", "`data.eval.a.weight` is not a key"),
    ("{train: {a: t, b: u}, stopping: all_exhausted}", "", "", "data.stopping", "`data.train` has no weights"),
    ("{train: t, stopping: first_exhausted}", "", "", "data.stopping", "`data.train` has no weights"),
    ("{train: {a: {path: t, weight: 1}}, stopping: longest}", "", "", "data.stopping", "'first_exhausted', 'all_exh"),
    ("{train: {a: t, b: {path: u, streaming: true}}}", "", "", "training.max_steps", "which has no length"),
    ("{train: t}", "reference: {kind: adapter, model: r}", "", "reference.model", "`reference.kind` is 'adapter'"),
    ("{train: t}", "reference: {kind: snapshot, model: r}", "", "reference.model", "`reference.kind` is 'snapshot'"),
    ("{train: t}", "reference: {kind: none, model: r}", "loss_type: sft", "reference.model", "kind` is 'none'"),
    ("{train: t}", "reference: {model: r}", "ref_adapter_name: x", "reference.model", "`training.ref_adapter_name` is"),
    ("{train: t}", "", "ref_model_weights: [0.5, 0.5]", "training.ref_model_weights", "there is nothing to weight"),
    ("{train: t}", "", "batch_eval_metrics: true", "training.batch_eval_metrics", "without `compute_metrics`"),
    ("{train: t}", "peft: {r: -4}", "", "peft.r", "`peft.r` must be"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "more", "training", "key", "said"), REFUSED)
def test_a_contradiction(tmp_path, data, more, training, key, said):
    options = ["output_dir: o", "use_cpu: true", *([training] if training else [])]
    lines = [
        "model: m", *f"data: {data}".split("\n"), more or "# no more",
        f"training: {{{', '.join(options)}}}",
    ]  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    section = key.partition(".")[0]
    line = {"data": 2, "reference": 3, "peft": 3, "training": 4}[section]
    with pytest.raises(RunFileError, match=f"{said}") as error:
        read_run_file(path).training_arguments()
    assert f"run.yaml, line {line}: " in str(error.value)


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ("{train: t, eval: e}", "eval_strategy: steps, metric_for_best_model: eval_loss"),
        (f"{{train: t, eval: {SETS}}}", "eval_strategy: steps, metric_for_best_model: eval_hard_loss"),
        (f"{{train: t, eval: {SETS}}}", "eval_strategy: steps, metric_for_best_model: easy_rewards/margins"),
        ("{train: {path: t, streaming: true}}", "max_steps: 3"),
        ("{train: {a: t, b: {path: u, split: s, name: n}}}", ""),
        ("{train: {a: {path: t, weight: 1}, b: {path: u, weight: 0.5}}, stopping: all_exhausted}", ""),
        ("{train: t, eval: e}", "eval_strategy: steps, metric_for_best_model: eval_loss/maths"),
        (f"{{train: t, eval: {SETS}}}", "eval_strategy: steps, metric_for_best_model: easy_rewards/margins/maths"),
    ],
)
def test_what_agrees(tmp_path, data, training):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: m\ndata: {data}\ntraining: {{output_dir: o, use_cpu: true, {training}}}\n", encoding="utf-8"
    )
    assert read_run_file(path).training_arguments().use_cpu
