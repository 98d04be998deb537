"""Log-probs of a model whose weights are sharded over two processes (FSDP2), against the whole model in each of them.

accelerate makes plain DDP of its FSDP settings on a CPU, so `fully_shard` is called here as accelerate would: once per
transformer block, and once for the model, whose group holds the embeddings, the last norm and the head.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object
from scenarios import RANK, Scenario
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.policy.prepare import disable_dropout
from holdfast.reference.scorers.adapter import AdapterReference
from holdfast.scoring import completion_head
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.score import score
from policies import POLICIES, rows


def _batch(seed: int) -> PairBatch:
    return PairBatch.from_tensors(PaddedLayout(0)(rows(4, seed=seed).to_list()))


def _sharded(
    policy: nn.Module, *, reshard_blocks: bool = True, reshard_root: bool = False, is_head_apart: bool = False
) -> nn.Module:
    mesh, causal_lm = init_device_mesh("cpu", (2,)), unwrap(policy)
    for block in causal_lm.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_blocks)
    if is_head_apart:
        fully_shard(causal_lm.lm_head, mesh=mesh, reshard_after_forward=True)
    return fully_shard(policy, mesh=mesh, reshard_after_forward=reshard_root)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None}


def _compare(
    folder: Path, make: Callable[[], nn.Module], *, is_recomputed: bool = False, **sharding: Any
) -> list[dict[str, Any]]:
    """Each process scores its own batch with the sharded model, and both batches with a whole one. Twice: a model's
    first forward pass also reads what it does to its logits."""
    policy, whole = _sharded(make(), **sharding), make()
    for model in (policy, whole):
        disable_dropout(model)
        if is_recomputed:
            unwrap(model).train().gradient_checkpointing_enable({"use_reentrant": False})
    turns = []
    for _ in range(2):
        policy.zero_grad()
        whole.zero_grad()
        with mock.patch.object(completion_head, "linear_logps", wraps=completion_head.linear_logps) as projected:
            found = score(policy, _batch(RANK), statistics=True, chunk_tokens=3)
        found.logps.sums().square().mean().backward()
        expected = [score(whole, _batch(rank), statistics=True) for rank in (0, 1)]
        (sum(scores.logps.sums().square().mean() for scores in expected) / 2).backward()
        ours, theirs = _gradients(policy), _gradients(whole)
        turns.append({
            "values_of_each_process": gather_object([found.logps.per_token.tolist()]),
            "entropies_of_each_process": gather_object([found.statistics.entropy.tolist()]),
            "expected_values": [scores.logps.per_token.tolist() for scores in expected],
            "expected_entropies": [scores.statistics.entropy.tolist() for scores in expected],
            "projected_as_a_matrix_by_each_process": gather_object([projected.called]),
            "num_gradients": [len(ours), len(theirs)],
            "gradient_error": max(float((ours[name] - theirs[name]).abs().max()) for name in theirs),
            "gradient_size": max(float(gradient.abs().max()) for gradient in theirs.values()),
        })  # fmt: skip
    return turns


def _adapter_reference(folder: Path, kind: str = "lora_fresh", **sharding: Any) -> dict[str, Any]:
    """A LoRA is sharded, then changed; its reference is asked between the policy's forward and backward."""
    policy, base = POLICIES[kind](), POLICIES[kind]()
    disable_dropout(policy)
    disable_dropout(base)
    policy = _sharded(policy, **sharding)
    reference = AdapterReference.capture(policy, contextlib.nullcontext)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    batch = _batch(RANK)
    scores = score(policy, batch)
    found = reference.logps(batch)
    scores.logps.sums().mean().backward()
    gradients = _gradients(policy)
    policy.zero_grad()
    score(policy, batch).logps.sums().mean().backward()
    unasked = _gradients(policy)
    return {
        "values_of_each_process": gather_object([found.per_token.tolist()]),
        "expected_values": [score(base, _batch(rank)).logps.per_token.tolist() for rank in (0, 1)],
        "policy_of_each_process": gather_object([scores.logps.per_token.tolist()]),
        "gradient_error": max(float((gradients[name] - unasked[name]).abs().max()) for name in unasked),
        "gradient_size": max(float(gradient.abs().max()) for gradient in unasked.values()),
    }


SCENARIOS: dict[str, Scenario] = {
    "sharded": partial(_compare, make=tiny_model),
    "sharded_and_resharded": partial(_compare, make=tiny_model, reshard_root=True),
    "sharded_and_kept": partial(_compare, make=tiny_model, reshard_blocks=False),
    "sharded_and_recomputed": partial(_compare, make=tiny_model, reshard_root=True, is_recomputed=True),
    "sharded_head_apart": partial(_compare, make=tiny_model, is_head_apart=True),
    "sharded_tied_head": partial(_compare, make=partial(tiny_model, "llama_tied")),
    "sharded_capped_head": partial(_compare, make=partial(tiny_model, "gemma2"), reshard_root=True),
    "sharded_lora": partial(_compare, make=POLICIES["lora_sft"], reshard_root=True),
    "sharded_adapter": _adapter_reference,
    "sharded_adapter_kept": partial(_adapter_reference, reshard_blocks=False),
    "sharded_adapter_resharded": partial(_adapter_reference, reshard_root=True),
    "sharded_trained_adapter": partial(_adapter_reference, kind="lora_sft"),
    "sharded_trained_adapter_resharded": partial(_adapter_reference, kind="lora_sft", reshard_root=True),
}
