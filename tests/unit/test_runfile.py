"""`run.yaml` -> objects: what each section becomes, and what each mistake is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig

from holdfast.cli.runfile import KEYS, RunFile, read_run_file
from holdfast.cli.sources import MixtureOfSources, Source
from holdfast.cli.yaml_document import RunFileError, read_document
from holdfast.cli.yaml_text import to_yaml
from holdfast.config import DPOConfig

SMALLEST = "model: folder/policy\ndata: {train: pairs.jsonl}\n"
DATA_KEYS = ", ".join(f"`{key.name.removeprefix('data.')}`" for key in KEYS if key.name.startswith("data."))
"""The keys of the section `data`, as messages list them."""


def test_the_data_of_a_run_are_for_training_and_evaluation():
    assert DATA_KEYS.startswith("`train`")
    assert "`eval`" in DATA_KEYS


@pytest.fixture
def write(tmp_path: Path):
    """Writes a run file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(write):
    """Reads a run file from its text."""

    def read(text: str, *overrides: str) -> RunFile:
        return read_run_file(write(text), overrides)

    return read


def arguments(read, training: str, *overrides: str) -> DPOConfig:
    return read(SMALLEST + f"training: {{use_cpu: true, {training}}}\n", *overrides).training_arguments()


# What it becomes -----------------------------------------------------------------------------------------------------


def test_smallest_file_means_the_defaults(read):
    run = read(SMALLEST)
    assert run["model"] == Source(path="folder/policy", options={})
    assert run["tokenizer"] == run["model"]
    assert run["data.train"] == Source(path="pairs.jsonl", options={})
    assert (run["data.eval"], run["reference.kind"], run["reference.model"]) == (None, "auto", None)
    assert run.peft_config() is None


def test_every_section_in_its_long_form(read):
    run = read(
        """
        model: {path: org/policy, revision: v2, subfolder: best, dtype: float32}
        data:
          train: {path: org/pairs, name: en, split: train}
          eval:
            easy: easy.jsonl
            hard: {path: org/pairs, split: hard}
        reference: {kind: model, model: {path: org/sft, revision: v7}}
        peft: {r: 4, target_modules: [q_proj, v_proj], lora_alpha: 8}
        training: {output_dir: out, beta: 0.5, loss_type: [sigmoid, sft], loss_weights: [1, 2], use_cpu: true}
        """
    )
    assert run["tokenizer"] == Source(path="org/policy", options={"revision": "v2", "subfolder": "best"})
    assert run["data.train"] == Source(path="org/pairs", options={"name": "en", "split": "train"})
    assert run["data.eval"] == {
        "easy": Source(path="easy.jsonl", options={}),
        "hard": Source(path="org/pairs", options={"split": "hard"}),
    }
    args = run.training_arguments()
    assert (args.output_dir, args.beta, args.reference) == ("out", 0.5, "model")
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 2.0])
    assert args.model_init_kwargs == {"revision": "v2", "subfolder": "best", "dtype": "float32"}
    peft = run.peft_config()
    assert isinstance(peft, LoraConfig)
    assert (peft.r, peft.target_modules, peft.lora_alpha, peft.task_type) == (4, {"q_proj", "v_proj"}, 8, "CAUSAL_LM")


def test_a_reference_model_shares_the_dtype_but_not_the_revision_of_the_policy(read):
    run = read(
        "model: {path: a, revision: v2, dtype: float32}\ndata: {train: t}\ntraining: {use_cpu: true}\n"
        "reference: {model: {path: b, subfolder: x}}"
    )
    assert run["reference.model"] == Source(path="b", options={"subfolder": "x"})
    assert run.training_arguments().ref_model_init_kwargs == {"dtype": "float32", "subfolder": "x"}


def test_a_reference_can_be_a_single_word(read):
    assert read(SMALLEST + "reference: none")["reference.kind"] == "none"


def test_one_evaluation_set_is_not_a_mapping_of_sets(read):
    text = "model: m\ndata: {train: t, eval: {path: e, split: test}}"
    assert read(text)["data.eval"] == Source(path="e", options={"split": "test"})


def test_the_tokenizer_may_be_elsewhere(read):
    assert read(SMALLEST + "tokenizer: {path: t, revision: v1}")["tokenizer"] == Source(
        path="t", options={"revision": "v1"}
    )
    assert read(SMALLEST + "tokenizer: t")["tokenizer"] == Source(path="t", options={})


def test_adapters_other_than_lora(read):
    peft = read(SMALLEST + "peft: {peft_type: IA3, target_modules: [k_proj]}").peft_config()
    assert isinstance(peft, IA3Config)
    assert peft.target_modules == {"k_proj"}


def test_nested_config_of_an_adapter(read):
    peft = read(SMALLEST + "peft: {init_lora_weights: eva, eva_config: {rho: 3}}").peft_config()
    assert isinstance(peft, LoraConfig)
    assert peft.eva_config is not None
    assert peft.eva_config.rho == 3.0


def test_a_date_needs_no_quotes(read):
    assert arguments(read, "template_date: 2026-01-31").template_date == "2026-01-31"
    assert arguments(read, "template_date: '2026-01-31'").template_date == "2026-01-31"
    with pytest.raises(RunFileError, match="template_date='2026-1-31' was asked for; it is a date as YYYY-MM-DD"):
        arguments(read, "template_date: 2026-1-31")


def test_resume_takes_a_folder_or_true(read):
    assert arguments(read, "resume_from_checkpoint: true").resume_from_checkpoint is True
    assert arguments(read, "resume_from_checkpoint: out/checkpoint-3").resume_from_checkpoint == "out/checkpoint-3"


def test_fsdp_is_a_truth_value(read):
    """It is read, and then refused for what it needs: several processes."""
    with pytest.raises(RunFileError, match="fsdp=True was asked for in a single process"):
        arguments(read, "fsdp: true")


def test_mappings_of_libraries_may_have_numbers_as_keys(read):
    args = arguments(read, "model_init_kwargs: {max_memory: {0: 1GB, cpu: 2GB}}")
    assert args.model_init_kwargs == {"max_memory": {0: "1GB", "cpu": "2GB"}}
    with pytest.raises(RunFileError, match=r"`training\.model_init_kwargs` has the key 0, and its keys are text"):
        arguments(read, "model_init_kwargs: {0: 1GB}")


# Scalars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # PyYAML by itself: the string "1e-6"
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("010", 10.0),  # PyYAML: octal, 8
        ("-.inf", float("-inf")),
        ("no", "no"),  # PyYAML: False
        ("on", "on"),
        ("1:30", "1:30"),  # PyYAML: 90, sexagesimal
        ("2026-01-01", "2026-01-01"),  # PyYAML: a date
        ("0x10", "0x10"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("'1e-6'", "1e-6"),
    ],
)
def test_scalars_are_read_by_yaml_1_2(write, text, value):
    read = read_document(write(f"key: {text}\n")).values["key"]
    assert read == value
    assert type(read) is type(value)


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
)


@given(st.dictionaries(st.text("abcdefgh_", min_size=1), st.recursive(_scalars, st.lists, max_leaves=5)))
def test_what_is_dumped_reads_back_the_same(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(to_yaml({"x": values}), encoding="utf-8", newline="")
    assert read_document(path).values == {"x": values}


@pytest.mark.parametrize("text", ["no", "1e-6", "010", "null", "1:30", "true", "~", "<<", "2026-01-01", ""])
def test_strings_that_look_like_other_things_survive(write, text):
    assert read_document(write(to_yaml({"x": text}))).values == {"x": text}


def test_numbers_become_the_type_of_their_field(read):
    args = arguments(read, "learning_rate: 1e-6, beta: 1, max_steps: 1e3, save_strategy: no")
    assert (args.learning_rate, args.beta, args.max_steps) == (1e-6, 1.0, 1000)
    assert type(args.beta) is float
    assert type(args.max_steps) is int
    assert args.save_strategy == "no"


def test_several_training_sets_are_a_mixture(read):
    run = read("model: m\ndata: {train: {a: a.jsonl, b: {path: org/b, split: s, streaming: true}}}")
    sources = {
        "a": Source(path="a.jsonl", options={}),
        "b": Source(path="org/b", options={"split": "s", "streaming": True}),
    }
    assert run["data.train"] == MixtureOfSources(sources=sources, weights=None)
    assert run["data.train"].is_stream
    run = read("model: m\ndata: {train: {a: {path: t, weight: 3}, b: {path: u, weight: 0.5}}}")
    sources = {"a": Source(path="t", options={}), "b": Source(path="u", options={})}
    assert run["data.train"] == MixtureOfSources(sources=sources, weights={"a": 3.0, "b": 0.5})
    assert not run["data.train"].is_stream


def test_anchors_and_merge_keys(read):
    run = read("model: m\ndata: {train: &pairs {path: p, name: en}, eval: {<<: *pairs, split: test}}")
    assert run["data.eval"] == Source(path="p", options={"name": "en", "split": "test"})


# Overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_win_in_order_and_are_read_as_yaml(read):
    args = arguments(read, "beta: 0.1", "training.beta=0.2", "training.beta=0.3", "training.loss_type=[ipo]")
    assert (args.beta, args.loss_type) == (0.3, ["ipo"])


def test_an_override_makes_the_sections_on_its_way(read):
    assert read(SMALLEST, "peft.target_modules=[q_proj]").peft_config().target_modules == {"q_proj"}


def test_an_override_can_remove_a_section(read):
    assert read(SMALLEST + "peft: {r: 4}", "peft=null").peft_config() is None


def test_an_override_keeps_an_equals_sign_in_its_value(read):
    assert read(SMALLEST, "data.train=a=b.jsonl")["data.train"].path == "a=b.jsonl"


@pytest.mark.parametrize("override", ["training.beta", "=1", "training..beta=1", ""])
def test_an_override_without_key_or_value(read, override):
    with pytest.raises(RunFileError, match=r"^--set .*: expected key=value. Write, for example, --set training.beta="):
        read(SMALLEST, override)


def test_an_override_inside_a_string(read):
    with pytest.raises(
        RunFileError, match=r"`revision` can only be set inside a mapping; found the string 'm'.*path: m"
    ):
        read("model: m\ndata: {train: t}", "model.revision=v1")


def test_an_override_that_is_not_yaml(read):
    with pytest.raises(RunFileError, match=r"^--set training.loss_type=\[ipo: the value is not readable as YAML"):
        read(SMALLEST, "training.loss_type=[ipo")


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", r"run.yaml, line 1: `modle` is not a key of the run file. Did you mean `model`\?"),
        ("model: {pth: m}\ndata: {train: t}", r"line 1: `model.pth` is not a key of the section `model`.*`path`\?"),
        ("model: m\ndata:\n  trian: t", r"line 3: `data.trian` is not a key .* Did you mean `train`\?"),
        ("model: m\ndata: {train: {path: t, spilt: x}}", r"`data.train.spilt` is not a key .* Did you mean `split`\?"),
        (SMALLEST + "reference: {knid: model}", r"line 3: `reference.knid` .* Did you mean `kind`\?"),
        (SMALLEST + "beta: 0.1", r"line 3: `beta` is not a key of the run file. Did you mean `training.beta`\?"),
        (SMALLEST + "lora_alpha: 8", r"line 3: `lora_alpha` .* Did you mean `peft.lora_alpha`\?"),
        (SMALLEST + "zzz: 1", r"The valid keys are data, model, peft, reference, tokenizer, training\."),
        ("model: m\nmodel: n", r"run.yaml, line 2: not readable as YAML: the key `model` is given twice; keep one"),
        ("model: [m", r"run.yaml, line 1: not readable as YAML: .* Correct this line"),
        ("- model", r"run.yaml: a run file is a mapping of sections; found the list \['model'\]"),
        ("? [a]\n: b", r"run.yaml, line 1: not readable as YAML: found unhashable key"),
        ("data: {train: t}", r"run.yaml: a run needs a model; found no `model`. Write `model: "),
        ("model: m", r"run.yaml: a run needs data; found no `data`. Write `data: \{train: "),
        ("model: m\ndata: t.jsonl", rf"line 2: `data` must be a mapping of {DATA_KEYS}; found the string 't.jsonl'"),
        ("model: m\ndata: {eval: t}", r"line 2: `data` needs `train`"),
        ("model: {revision: v}\ndata: {train: t}", r"line 1: `model` needs `path`; found revision. Write `path: "),
        ("model: m\ndata: {train: t, eval: {split: x}}", r"line 2: `data.eval` needs `path`; found split"),
        ("model: 5\ndata: {train: t}", r"line 1: `model` must be a mapping of .*; found the number 5"),
    ],
)
def test_mistakes_in_the_file(read, text, message):
    with pytest.raises(RunFileError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("btea: 0.1", r"line 3: `training.btea` is not a key of the section `training`. Did you mean `beta`\?"),
        ("lora_dropout: 0.1", r"`training.lora_dropout` is not a key .* Did you mean `peft.lora_dropout`\?"),
        ("tokenizer: t", r"`training.tokenizer` is not a key .* Did you mean `tokenizer`\?"),
        (
            "learning_rate: '1e-6'",
            r"`training.learning_rate` must be a number; found the string '1e-6'.*without quotes",
        ),
        ("learning_rate: fast", r"`training.learning_rate` must be a number; found the string 'fast'\.$"),
        ("max_steps: 1.5", r"`training.max_steps` must be a whole number; found the number 1.5"),
        ("max_steps: true", r"`training.max_steps` must be a whole number; found the boolean True"),
        ("sync_ref_model: yes", r"`training.sync_ref_model` must be true or false; found the string 'yes'"),
        ("run_name: 7", r"`training.run_name` must be a string or null; found the number 7. Put it in quotes: \"7\""),
        (
            "max_length: None",
            r"`training.max_length` must be a whole number or null; found the string 'None'. Write null",
        ),
        ("loss_weights: [1, a]", r"`training.loss_weights.1` must be a number; found the string 'a'"),
        ("reference: model", r"`training.reference` was set. Write it as the section `reference:`"),
        ("do_train: false", r"`training.do_train` was set. `holdfast train` always trains; remove it"),
        ("save_strategy: sometimes", r"run.yaml, line 3: the training arguments were refused: .*sometimes"),
        ("beta: -1", r"run.yaml, line 3: the training arguments were refused: beta must be .*got -1"),
        (
            "model_init_kwargs: {dtype: float16}",
            r"`dtype` is set twice: `model.dtype` is 'float32'.*'float16'. Keep one",
        ),
    ],
)
def test_mistakes_in_the_training_section(read, training, message):
    text = f"model: {{path: m, dtype: float32}}\ndata: {{train: t}}\ntraining: {{use_cpu: true, {training}}}"
    with pytest.raises(RunFileError, match=message):
        read(text).training_arguments()


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (
            "{lora_alhpa: 8}",
            r"line 3: `peft.lora_alhpa` is not a key of the section `peft`. Did you mean `lora_alpha`\?",
        ),
        ("{beta: 8}", r"`peft.beta` is not a key .* Did you mean `training.beta`\?"),
        ("{peft_type: LORAA}", r"`peft.peft_type` must name a kind of adapter; found 'LORAA'. Try LORA\."),
        ("{r: big}", r"`peft.r` must be a whole number; found the string 'big'"),
        ("true", r"line 3: `peft` must be a mapping of .*; found the boolean True"),
        ("{eva_config: {roh: 2}}", r"`peft.eva_config.roh` is not a key .* Did you mean `rho`\?"),
        ("{layers_pattern: a, target_modules: '.*'}", r"line 3: the LORA config was refused: "),
    ],
)
def test_mistakes_in_the_peft_section(read, peft, message):
    with pytest.raises(RunFileError, match=message):
        read(f"model: m\ndata: {{train: t}}\npeft: {peft}").peft_config()


def test_a_mistake_in_an_override_is_placed_there(read):
    with pytest.raises(RunFileError, match=r"^--set training.btea: `training.btea` is not a key"):
        arguments(read, "beta: 0.1", "training.btea=0.2")


def test_no_such_file(tmp_path):
    with pytest.raises(RunFileError, match=r"nowhere.yaml: no such run file. Give the path of a YAML file"):
        read_run_file(tmp_path / "nowhere.yaml")


def test_a_folder_is_not_a_run_file(tmp_path):
    with pytest.raises(RunFileError, match=r"the run file cannot be read .*directory.* It must be a YAML text file"):
        read_run_file(tmp_path)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(RunFileError, match=r"the run file cannot be read .* It must be a YAML text file in UTF-8"):
        read_run_file(tmp_path / "model.bin")
