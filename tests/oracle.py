"""A naive fp32 oracle: log-probs and losses written again from the papers, slowly, and apart from the package.

One unpadded row per completion, full logits, Python loops over pairs and tokens, every formula spelled out (no
log-sigmoid, no expm1, no masks). It imports nothing of the package, so an error would have to be made twice. Everything
is differentiable; gradients come from autograd. Given up: speed, and extreme margins (naive exponentials overflow).

A loss takes, for each of the two models, one 1-D tensor of per-token log-probs (nats) per chosen completion and one per
rejected completion, and `options`: a dict that may leave out what it does not change (see `DEFAULTS`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tokens = Sequence[Tensor]
Options = dict[str, Any]

DEFAULTS: Options = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "dpop_lambda": 50.0,
    "rainbow_alpha": 0.25,
    "rainbow_gamma": 0.5,
    "alpha_dpo_alpha": 0.1,
    "alpha_dpo_gamma": 0.5,
    "beta_dpo_alpha": 0.6,
    "beta_dpo_share": 0.8,
    "ld_alpha": None,
    "earlier": (),
}


def completion_log_softmax(model: torch.nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Tensor:
    """Log-probs (fp32) over the vocabulary, [completion tokens, V], where each completion token is predicted."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
    logits = model(input_ids=input_ids, use_cache=False).logits.float()  # [1 T V]
    first = len(prompt_ids) - 1  # the last prompt token predicts the first completion token
    return logits.log_softmax(-1)[0, first : first + len(completion_ids)]


def sequence_logps(model: torch.nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Tensor:
    """Log-prob (nats, fp32) of each completion token given what precedes it, 1-D."""
    log_probs = completion_log_softmax(model, prompt_ids, completion_ids)
    return torch.stack([log_probs[place, token] for place, token in enumerate(completion_ids)])


def sequence_log_sum_sq_probs(
    model: torch.nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int]
) -> Tensor:
    """log sum_v p(v)^2 (fp32) where each completion token is predicted, 1-D: what WPO normalises by."""
    return (completion_log_softmax(model, prompt_ids, completion_ids).exp() ** 2).sum(-1).log()


def scored(values: Tensor, mask: Sequence[int] | None) -> Tensor:
    """Of one value for each completion token, those of the tokens that count; None and an empty mask: all of them."""
    return values if not mask else torch.stack([value for value, counts in zip(values, mask, strict=True) if counts])


def wpo_weights(chosen: Tokens, rejected: Tokens, chosen_log_sum_sq: Tokens, rejected_log_sum_sq: Tokens) -> Tensor:
    """Per pair, w(y_w) w(y_l) with w(y) = exp((1/|y|) sum_t log(p(y_t) / sum_v p(v)^2)), without gradient."""

    def weight(logps: Tensor, log_sum_sq: Tensor) -> Tensor:
        terms = [torch.log(torch.exp(logp) / torch.exp(norm)) for logp, norm in zip(logps, log_sum_sq, strict=True)]
        return torch.exp(sum(terms) / len(terms)).detach()

    weights_w = [weight(*each) for each in zip(chosen, chosen_log_sum_sq, strict=True)]
    weights_l = [weight(*each) for each in zip(rejected, rejected_log_sum_sq, strict=True)]
    return torch.stack([weight_w * weight_l for weight_w, weight_l in zip(weights_w, weights_l, strict=True)])


def _sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _logp(tokens: Tensor, partner: Tensor, ld_alpha: float | None) -> Tensor:
    """log pi(y|x); with LD-DPO the tokens beyond the pair's shorter completion count `ld_alpha` each."""
    shared = min(len(tokens), len(partner))
    total = torch.zeros((), dtype=tokens.dtype)
    for place, logp in enumerate(tokens):
        total = total + (logp if ld_alpha is None or place < shared else ld_alpha * logp)
    return total


def _f_prime(log_ratio: Tensor, options: Options) -> Tensor:
    """f'(t) at t = exp(log ratio), constants chosen so that f'(1) = 0 for each divergence."""
    t = torch.exp(log_ratio)
    alpha = 1 - options["f_alpha_divergence_coef"]  # the paper's
    match options["f_divergence_type"]:
        case "reverse_kl":
            return torch.log(t)
        case "forward_kl":
            return 1 - 1 / t
        case "js_divergence":
            return torch.log(2 * t / (1 + t))
        case "alpha_divergence":
            return torch.log(t) if alpha == 0 else (1 - t**-alpha) / alpha
    raise KeyError(options["f_divergence_type"])


class _Pair:
    """The quantities that papers name, of one pair: w chosen, l rejected."""

    def __init__(self, tokens_w: Tensor, tokens_l: Tensor, ref_w: Tensor | None, ref_l: Tensor | None, o: Options):
        self.o, self.beta, self.eps = o, o["beta"], o["label_smoothing"]
        self.length_w, self.length_l = len(tokens_w), len(tokens_l)
        self.logp_w, self.logp_l = _logp(tokens_w, tokens_l, o["ld_alpha"]), _logp(tokens_l, tokens_w, o["ld_alpha"])
        if ref_w is not None and ref_l is not None:
            self.ref_w, self.ref_l = _logp(ref_w, ref_l, o["ld_alpha"]), _logp(ref_l, ref_w, o["ld_alpha"])
            self.ratio_w, self.ratio_l = self.logp_w - self.ref_w, self.logp_l - self.ref_l
            self.score_w, self.score_l = _f_prime(self.ratio_w, o), _f_prime(self.ratio_l, o)


def _smoothed(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * torch.log(_sigma(x)) - eps * torch.log(_sigma(-x))


def _sigmoid(p: _Pair) -> Tensor:
    return _smoothed(p.beta * (p.score_w - p.score_l), p.eps)


def _hinge(p: _Pair) -> Tensor:
    slack = 1 - p.beta * (p.score_w - p.score_l)
    return slack if slack > 0 else slack * 0


def _ipo(p: _Pair) -> Tensor:
    return (p.score_w / p.length_w - p.score_l / p.length_l - 1 / (2 * p.beta)) ** 2


def _exo_pair(p: _Pair) -> Tensor:
    model = torch.softmax(torch.stack([p.beta * p.score_w, p.beta * p.score_l]), 0)
    labels = [1 - p.eps, p.eps]
    return sum(model[i] * (torch.log(model[i]) - math.log(labels[i])) for i in range(2))


def _nca_pair(p: _Pair) -> Tensor:
    reward_w, reward_l = p.beta * p.ratio_w, p.beta * p.ratio_l
    attract = -torch.log(_sigma(reward_w))
    repel = -sum(torch.log(_sigma(-reward)) for reward in (reward_w, reward_l)) / 2
    return attract + repel


def _robust(p: _Pair) -> Tensor:
    as_labelled = -torch.log(_sigma(p.beta * (p.score_w - p.score_l)))
    as_flipped = -torch.log(_sigma(p.beta * (p.score_l - p.score_w)))
    return ((1 - p.eps) * as_labelled - p.eps * as_flipped) / (1 - 2 * p.eps)


def _bco_pair(p: _Pair) -> Tensor:
    return -torch.log(_sigma(p.beta * p.ratio_w)) - torch.log(1 - _sigma(p.beta * p.ratio_l))


def _sppo_hard(p: _Pair) -> Tensor:
    eta = 1 / p.beta
    return (p.ratio_w - eta * (1 - 0.5)) ** 2 + (p.ratio_l - eta * (0 - 0.5)) ** 2


def _apo_zero(p: _Pair) -> Tensor:
    return 1 - _sigma(p.beta * p.ratio_w) + _sigma(p.beta * p.ratio_l)


def _apo_down(p: _Pair) -> Tensor:
    return _sigma(p.beta * p.ratio_w) + 1 - _sigma(p.beta * (p.ratio_w - p.ratio_l))


def _discopop(p: _Pair) -> Tensor:
    rho = p.beta * (p.score_w - p.score_l)
    mix = _sigma(rho / p.o["discopop_tau"])
    return (1 - mix) * -torch.log(_sigma(rho)) + mix * torch.exp(-rho)


def _sigmoid_norm(p: _Pair) -> Tensor:
    return -torch.log(_sigma(p.beta * (p.score_w / p.length_w - p.score_l / p.length_l)))


def _simpo(p: _Pair) -> Tensor:
    return -torch.log(_sigma(p.beta / p.length_w * p.logp_w - p.beta / p.length_l * p.logp_l - p.o["simpo_gamma"]))


def _odds_ratio(p: _Pair) -> Tensor:
    p_w, p_l = torch.exp(p.logp_w / p.length_w), torch.exp(p.logp_l / p.length_l)
    return -torch.log(_sigma(torch.log((p_w / (1 - p_w)) / (p_l / (1 - p_l)))))


def _contrast(p: _Pair) -> Tensor:
    return -torch.log(_sigma(p.beta * p.logp_w - p.beta * p.logp_l))


def _differences(p: _Pair, per_token: bool = False) -> tuple[Tensor, Tensor]:
    """What the policy, and what the reference thinks of w above l."""
    n_w, n_l = (p.length_w, p.length_l) if per_token else (1, 1)
    return p.logp_w / n_w - p.logp_l / n_l, p.ref_w / n_w - p.ref_l / n_l


def _hypo(p: _Pair, per_token: bool = False) -> Tensor:
    policy, reference = _differences(p, per_token)
    neutral = reference if reference > 0 else torch.zeros(())
    return _smoothed(p.beta * (policy - neutral), p.eps)


def _dpop(p: _Pair) -> Tensor:
    penalty = p.ref_w - p.logp_w if p.ref_w > p.logp_w else torch.zeros(())
    return _smoothed(p.beta * (p.ratio_w - p.ratio_l - p.o["dpop_lambda"] * penalty), p.eps)


def _rainbow(p: _Pair) -> Tensor:
    """The reference pi_ref^a pi_gamma^(1-a), whose log-prob of w above l is a mean of two."""
    policy, reference = _differences(p, per_token=True)
    mixed = p.o["rainbow_alpha"] * reference + (1 - p.o["rainbow_alpha"]) * p.o["rainbow_gamma"] / p.beta
    return _smoothed(p.beta * (policy - mixed), p.eps)


def gaps(name: str, chosen, rejected, ref_chosen, ref_rejected, options: Options) -> list[float]:
    """Of each pair, by how much more than the reference the policy prefers w; per token for `alpha_dpo`."""
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, options)
    both = (_differences(p, per_token=name == "alpha_dpo") for p in pairs)
    return [policy.item() - reference.item() for policy, reference in both]


def _moments(batches: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and standard deviation of the first batch; with each further one 0.9 of what they were and 0.1 of its own.
    The deviation is at least 0.01."""
    for number, values in enumerate(batches):
        own_mean = sum(values) / len(values)
        own_deviation = math.sqrt(sum((value - own_mean) ** 2 for value in values) / len(values))
        mean = own_mean if number == 0 else 0.9 * mean + 0.1 * own_mean
        deviation = own_deviation if number == 0 else 0.9 * deviation + 0.1 * own_deviation
    return mean, max(deviation, 0.01)


def _alpha_dpo(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    """`options["earlier"]` are the gaps of the batches of training before this one. One that is evaluated adds none."""
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, options)
    of_pairs, earlier = gaps("alpha_dpo", chosen, rejected, ref_chosen, ref_rejected, options), pairs[0].o["earlier"]
    is_evaluated = earlier and not chosen[0].requires_grad
    mean, deviation = _moments(earlier if is_evaluated else [*earlier, of_pairs])
    losses = []
    for p, gap in zip(pairs, of_pairs, strict=True):
        target = p.o["alpha_dpo_gamma"] + p.o["alpha_dpo_alpha"] * (gap - mean) / deviation
        losses.append(_smoothed(p.beta * _differences(p, True)[0] - target, p.eps))
    return torch.stack(losses)


def _beta_dpo(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    """The noise is the package's, of the batch's number; the draw is made again. `earlier` as in `_alpha_dpo`."""
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, options)
    of_pairs, earlier = gaps("beta_dpo", chosen, rejected, ref_chosen, ref_rejected, options), pairs[0].o["earlier"]
    is_evaluated = earlier and not chosen[0].requires_grad
    mean, deviation = _moments(earlier if is_evaluated else [*earlier, of_pairs])
    counts = [1.0] * len(pairs)
    share = pairs[0].o["beta_dpo_share"]
    if chosen[0].requires_grad and share < 1:
        draw = torch.Generator().manual_seed(len(earlier) + 1)
        noise = torch.empty(len(pairs)).exponential_(generator=draw).tolist()
        keys = [-((gap - mean) ** 2) / deviation**2 / 2 - math.log(e) for gap, e in zip(of_pairs, noise, strict=True)]
        num_drawn = max(1, round(share * len(pairs)))
        drawn = sorted(range(len(pairs)), key=lambda i: -keys[i])[:num_drawn]
        counts = [len(pairs) / num_drawn if i in drawn else 0.0 for i in range(len(pairs))]
    of_batch = sum(count * gap for count, gap in zip(counts, of_pairs, strict=True)) / len(pairs)
    beta = max(1e-3, pairs[0].beta * (1 + pairs[0].o["beta_dpo_alpha"] * (of_batch - mean)))
    losses = [-torch.log(_sigma(beta * (p.ratio_w - p.ratio_l))) for p in pairs]
    return torch.stack([count * loss for count, loss in zip(counts, losses, strict=True)])


def _pairs(chosen: Tokens, rejected: Tokens, ref_chosen: Tokens | None, ref_rejected: Tokens | None, options: Options):
    options = DEFAULTS | options
    nothing = [None] * len(chosen)
    rows = zip(chosen, rejected, ref_chosen or nothing, ref_rejected or nothing, strict=True)
    return [_Pair(*row, options) for row in rows]


def _each(per_pair: Callable[[_Pair], Tensor]) -> Callable[..., Tensor]:
    def losses(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
        return torch.stack([per_pair(p) for p in _pairs(chosen, rejected, ref_chosen, ref_rejected, options)])

    return losses


def _nll(chosen: Tokens) -> Tensor:
    return -torch.cat(list(chosen)).mean()


def _sft(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    return torch.stack([_nll(chosen) for _ in chosen])


def _orpo(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    pairs = _pairs(chosen, rejected, None, None, options)
    return torch.stack([_nll(chosen) + p.beta * _odds_ratio(p) for p in pairs])


def _cpo(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    pairs = _pairs(chosen, rejected, None, None, options)
    return torch.stack([_contrast(p) + p.o["cpo_alpha"] * _nll(chosen) for p in pairs])


def _aot(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, options)
    policy = sorted((p.logp_w - p.logp_l for p in pairs), key=Tensor.item)
    reference = sorted((p.ref_w - p.ref_l for p in pairs), key=Tensor.item)
    return torch.stack(
        [_smoothed(pairs[0].beta * (a - b), pairs[0].eps) for a, b in zip(policy, reference, strict=True)]
    )


def _aot_unpaired(chosen, rejected, ref_chosen, ref_rejected, options: Options) -> Tensor:
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, options)
    winners = sorted((p.ratio_w for p in pairs), key=Tensor.item)
    losers = sorted((p.ratio_l for p in pairs), key=Tensor.item)
    return torch.stack([_smoothed(pairs[0].beta * (a - b), pairs[0].eps) for a, b in zip(winners, losers, strict=True)])


LOSS_ORACLE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _each(_sigmoid),
    "hinge": _each(_hinge),
    "ipo": _each(_ipo),
    "exo_pair": _each(_exo_pair),
    "nca_pair": _each(_nca_pair),
    "robust": _each(_robust),
    "bco_pair": _each(_bco_pair),
    "sppo_hard": _each(_sppo_hard),
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _each(_apo_zero),
    "apo_down": _each(_apo_down),
    "discopop": _each(_discopop),
    "sft": _sft,
    "sigmoid_norm": _each(_sigmoid_norm),
    "simpo": _each(_simpo),
    "orpo": _orpo,
    "cpo": _cpo,
    "hypo": _each(_hypo),
    "hypo_norm": _each(lambda p: _hypo(p, per_token=True)),
    "dpop": _each(_dpop),
    "rainbow": _each(_rainbow),
    "alpha_dpo": _alpha_dpo,
    "beta_dpo": _beta_dpo,
}
