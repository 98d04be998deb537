"""In a file there is no progress bar, of whichever library and at whichever stage; `disable_tqdm` leaves no lines."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers

import tiny
from holdfast.cli.app import app

RUN = """\
model: model
data: {{train: rows.jsonl, eval: rows.jsonl}}
training:
  output_dir: out
  max_steps: 1
  per_device_train_batch_size: 2
  precompute_ref_log_probs: true
  eval_strategy: steps
  eval_steps: 1
  report_to: none
  use_cpu: true
  disable_tqdm: {quiet}
"""


@pytest.mark.parametrize("command", ["train", "precompute"])
@pytest.mark.parametrize("quiet", [True, False])
def test_progress_bars(
    command: str,
    quiet: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, tiny.preference_rows(8))))
    Path("run.yaml").write_text(RUN.format(quiet=str(quiet).lower()))
    capfd.readouterr()
    with warnings.catch_warnings():  # of an environment variable that keeps the hub's off
        warnings.simplefilter("ignore")
        transformers.enable_progress_bar()  # something may have switched it off
    app([command, "run.yaml"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert not [each for each in (out + err).replace("\n", "") if not each.isprintable()]
    assert not [line for line in (out + err).splitlines() if "%|" in line or "it/s" in line]
    if command == "train":
        assert ("step 1/1  trained in" in out) != quiet
