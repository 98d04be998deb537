"""A world small enough to know everything about: a source of text, a reward, and people who prefer by it.

The source is a Markov chain over a dozen words, the reward a sum of word and word-pair scores. Both look one token back
and no further, so tilting the source by `exp(reward / beta)` gives a Markov chain again, found exactly by one backward
pass. The demo leans on that: the tilted source is next to the best possible proposal for the optimal policy of a model
that learnt the source (see `frontier`). Given up: rewards that look at a whole text, and texts of different lengths,
so nothing here says anything about length bias.

Dimensions: P pairs, S texts, T tokens per text (the prompt, one `<bos>`, is not among them), V vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PAD_ID, BOS_ID, EOS_ID = range(3)

VOCABULARY_SIZE = 16
TEXT_LENGTH = 11
"""With `<bos>` in front, 12 positions."""

_SPECIAL_PROBABILITY = 1e-4
"""What the source gives each special token, so that no text is impossible and every log-prob finite."""
_SUCCESSOR_SPREAD = 2.0
"""Standard deviation of a word's successor logits: three or four likely successors each."""
_UNIGRAM_SCALE, _BIGRAM_SCALE = 0.3, 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A Markov chain of T steps: `steps[t, u, v] = log p(y_t = v | y_{t-1} = u)`, where `y_{-1}` is `<bos>`."""

    steps: Float[Tensor, "T V V"]

    @property
    def length(self) -> int:
        return self.steps.shape[0]

    @property
    def vocabulary_size(self) -> int:
        return self.steps.shape[1]

    def token_logps(self, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S T"]:
        """`log p(y_t | y_{t-1})` of every token, nats."""
        return _gather_steps(self.steps, texts)

    def sample(self, num_texts: int, generator: torch.Generator) -> Int[Tensor, "S T"]:
        """Texts drawn from the chain."""
        previous = torch.full((num_texts,), BOS_ID)
        columns = []
        for step in self.steps.exp():
            previous = torch.multinomial(step[previous], 1, generator=generator)[:, 0]
            columns.append(previous)
        return torch.stack(columns, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Preference pairs: row p of `chosen` was preferred to row p of `rejected`."""

    chosen: Int[Tensor, "P T"]
    rejected: Int[Tensor, "P T"]

    def rows(self) -> dict[str, list[list[int]]]:
        """The columns of a dataset of already tokenized rows, the prompt being `<bos>`."""
        return {
            "prompt_ids": [[BOS_ID]] * len(self.chosen),
            "chosen_ids": self.chosen.tolist(),
            "rejected_ids": self.rejected.tolist(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A source of text and a reward: `r(y) = sum_t scores[t, y_{t-1}, y_t]`, in nats of preference (log-odds)."""

    source: Chain
    scores: Float[Tensor, "T V V"]

    def reward(self, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S"]:
        """The true reward of each text."""
        return _gather_steps(self.scores, texts).sum(1)

    def label(self, first: Int[Tensor, "P T"], second: Int[Tensor, "P T"], generator: torch.Generator) -> Pairs:
        """The pairs, labelled by people who prefer by the reward but not always.

        `P(first > second) = sigmoid(r(first) - r(second))` (Bradley and Terry 1952).
        """
        probability = torch.sigmoid(self.reward(first) - self.reward(second))
        is_first = torch.rand(probability.shape, generator=generator, dtype=probability.dtype) < probability
        is_first = is_first[:, None]
        return Pairs(chosen=torch.where(is_first, first, second), rejected=torch.where(is_first, second, first))

    def tilted_source(self, beta: float) -> tuple[Chain, float]:
        """The chain `p*(y) = p_source(y) exp(r(y) / beta) / Z`, and `log Z` (nats); exact, by dynamic programming.

        With `m_T = 0` and `m_{t-1}(u) = logsumexp_v [log p_t(v|u) + scores_t(u, v) / beta + m_t(v)]`, the steps are
        `log p*_t(v|u) = log p_t(v|u) + scores_t(u, v) / beta + m_t(v) - m_{t-1}(u)` and `log Z = m_0(<bos>)`.
        """
        message = self.source.steps.new_zeros(self.source.vocabulary_size)
        steps = []
        for step, scores in zip(self.source.steps.flip(0), self.scores.flip(0), strict=True):
            unnormalised = step + scores / beta + message  # [V V]
            message = unnormalised.logsumexp(1)
            steps.append(unnormalised - message[:, None])
        return Chain(steps=torch.stack(steps[::-1])), float(message[BOS_ID])


def make_world(*, vocabulary_size: int = VOCABULARY_SIZE, length: int = TEXT_LENGTH, seed: int = 0) -> World:
    """A random world, the same for the same seed: fp64, special tokens improbable and without reward."""
    num_words = vocabulary_size - len(SPECIAL_TOKENS)
    if num_words < 1 or length < 1:
        raise ValueError(
            f"a world of {vocabulary_size} tokens and texts of {length} was asked for; {len(SPECIAL_TOKENS)} tokens "
            f"are special, so {num_words} words are left. Ask for at least {len(SPECIAL_TOKENS) + 1} tokens and "
            "length 1."
        )
    generator = torch.Generator().manual_seed(seed)
    words = slice(len(SPECIAL_TOKENS), vocabulary_size)
    probabilities = torch.full((vocabulary_size, vocabulary_size), _SPECIAL_PROBABILITY, dtype=torch.float64)
    # After a special token every word is as likely: nothing that a model could only learn from very rare texts.
    probabilities[:, words] = 1 / num_words
    probabilities[words, words] = _successors(num_words, generator)
    transition = probabilities.log().log_softmax(1)
    unigram, bigram = torch.zeros(vocabulary_size).double(), torch.zeros(vocabulary_size, vocabulary_size).double()
    unigram[words] = _UNIGRAM_SCALE * torch.randn(num_words, generator=generator, dtype=torch.float64)
    bigram[words, words] = _BIGRAM_SCALE * torch.randn(num_words, num_words, generator=generator, dtype=torch.float64)
    return World(
        source=Chain(steps=transition.expand(length, -1, -1).contiguous()),
        scores=(unigram + bigram).expand(length, -1, -1).contiguous(),
    )


def make_tokenizer(vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in memory: `<pad> <bos> <eos>`, then `w3`, `w4`, ... (a word is named by its id)."""
    words = (*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), vocabulary_size)))
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=eos))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def _successors(num_words: int, generator: torch.Generator) -> Float[Tensor, "W W"]:
    """Rows of next-word probabilities: a few words likely, and 2 % spread evenly so that none is out of reach."""
    logits = _SUCCESSOR_SPREAD * torch.randn(num_words, num_words, generator=generator, dtype=torch.float64)
    return 0.98 * logits.softmax(1) + 0.02 / num_words


def _gather_steps(steps: Float[Tensor, "T V V"], texts: Int[Tensor, "S T"]) -> Float[Tensor, "S T"]:
    """`steps[t, texts[s, t - 1], texts[s, t]]`, where what stands before the first token is `<bos>`."""
    previous = torch.cat((torch.full_like(texts[:, :1], BOS_ID), texts[:, :-1]), dim=1)
    return steps[torch.arange(texts.shape[1]), previous, texts]
