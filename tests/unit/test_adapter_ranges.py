"""Adapters of a run file: what peft takes and should not is refused before anything is loaded."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from holdfast.cli.adapter_ranges import RULES
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError

KINDS = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.fixture
def adapter(tmp_path: Path):
    """The peft config of a run file with this section."""

    def adapter(section: str):
        path = tmp_path / "run.yaml"
        path.write_text(f"model: m\ndata: {{train: t}}\npeft: {section}\n", encoding="utf-8")
        return read_run_file(path).peft_config()

    return adapter


REFUSED = {
    "r": ("-4", "0", "1e18", "1000001"),
    "lora_alpha": ("0", "-1", "10000000"),
    "lora_dropout": ("7", "1", "-0.1", ".nan", ".inf"),
    "target_modules": ("''", "' '", "'['", "['']", "[]", "'*'"),
    "modules_to_save": ("['']", "[' ']"),
    "exclude_modules": ("'('",),
    "layers_to_transform": ("-1", "[]", "[-1]", "[0, -3]"),
    "rank_pattern": ("{q: 0}", "{q: -2}", "{'[': 2}", "{q: [2]}", "{q: x}"),
    "alpha_pattern": ("{q: 0}", "{q: .nan}"),
    "bias": ("some",),
    "init_lora_weights": ("nicely", "3"),
    "inference_mode": ("true",),
    "task_type": ("SEQ_CLS", "null", "x"),
    "layer_replication": ("[[0]]", "[[0, -1]]", "[0, 1]"),
    "trainable_token_indices": ("[-1]", "{embed_tokens: [-5]}"),
    "qalora_group_size": ("0",),
    "base_model_name_or_path": ("somewhere",),
    "eva_config": ("{rho: -1}", "{rho: .nan}"),
}
OF_OTHER_KINDS = {
    "{peft_type: ADALORA, total_step: 10, init_r: 0}": "init_r",
    "{peft_type: ADALORA, total_step: 10, beta1: 1}": "beta1",
    "{peft_type: ADALORA, total_step: 0}": "total_step",
    "{peft_type: LOHA, module_dropout: 1}": "module_dropout",
    "{peft_type: LOKR, decompose_factor: -2}": "decompose_factor",
    "{peft_type: OFT, r: -1}": "r",
    "{peft_type: OFT, eps: 1e300}": "eps",
    "{peft_type: VERA, d_initial: .inf}": "d_initial",
    "{peft_type: PROMPT_TUNING, num_virtual_tokens: 0}": "num_virtual_tokens",
    "{peft_type: PROMPT_TUNING, num_virtual_tokens: 4, prompt_tuning_init: NICELY}": "prompt_tuning_init",
    "{peft_type: P_TUNING, num_virtual_tokens: 4, encoder_dropout: 2}": "encoder_dropout",
    "{peft_type: IA3, feedforward_modules: ['']}": "feedforward_modules",
    "{peft_type: BOFT, bias: few}": "bias",
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in REFUSED for value in REFUSED[field]])
def test_a_field_of_lora_out_of_range(adapter, field, value):
    with pytest.raises(RunFileError, match=rf"run.yaml, line 3: `peft\.{field}(\.\d)*` (must be|was refused)"):
        adapter(f"{{{field}: {value}}}")


@pytest.mark.parametrize(("section", "field"), OF_OTHER_KINDS.items())
def test_a_field_of_another_kind_out_of_range(adapter, section, field):
    with pytest.raises(RunFileError, match=rf"run.yaml, line 3: `peft\.{field}` must be .*; found "):
        adapter(section)


@pytest.mark.parametrize(
    "section",
    [
        "{r: 1, lora_alpha: 1, lora_dropout: 0}",
        "{r: 256, lora_alpha: 512, lora_dropout: 0.5, use_rslora: true, bias: lora_only}",
        "{target_modules: all-linear, exclude_modules: lm_head}",
        "{target_modules: [q_proj], layers_to_transform: [0, 3], layers_pattern: layers}",
        "{target_modules: '.*(q|v)_proj', modules_to_save: [lm_head]}",
        "{target_modules: [], target_parameters: [experts.w1]}",
        "{init_lora_weights: pissa_niter_16}",
        "{rank_pattern: {'^layers.0': 4}, alpha_pattern: {q: 2.5}, layer_replication: [[0, 4], [2, 5]]}",
        "{trainable_token_indices: {embed_tokens: [0, 7]}}",
        "{peft_type: OFT, r: 0, oft_block_size: 4}",
        "{peft_type: LOKR, decompose_factor: -1}",
        "{peft_type: VERA, projection_prng_key: 4294967295}",
        "{peft_type: PROMPT_TUNING, num_virtual_tokens: 8, prompt_tuning_init: RANDOM}",
    ],
)
def test_what_is_in_range(adapter, section):
    assert adapter(section) is not None


@pytest.mark.parametrize("kind", ["[LORA]", "{a: LORA}", "3", "null", "lora", "LORAA", "''"])
def test_what_is_no_kind_of_adapter(adapter, kind):
    with pytest.raises(RunFileError, match=r"line 3: `peft.peft_type` must name a kind of adapter; found "):
        adapter(f"{{peft_type: {kind}}}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_each_kind_are_in_range(kind):
    """A rule that refused peft's own default would be about another meaning of the field."""
    for field in fields(KINDS[kind]):
        if field.default is MISSING or field.default is None or field.name == "task_type":
            continue
        for rule in RULES:
            if re.fullmatch(rule.pattern, field.name):
                assert rule.holds(field.default, field.default), (field.name, field.default)
