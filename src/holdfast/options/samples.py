"""The options of completions that are generated at evaluations."""

from dataclasses import dataclass

from holdfast.losses.options import option


@dataclass(kw_only=True)
class SampleOptions:
    """Options about samples. `DPOConfig` inherits them, and checks them with the others."""

    generate_samples: int = option(
        0,
        "At each evaluation, complete so many prompts of each evaluation set, by the policy and by its reference; 0 "
        "completes none.",
    )
    samples_max_new_tokens: int = option(128, "Tokens after which such a completion ends, if it has not before.")
