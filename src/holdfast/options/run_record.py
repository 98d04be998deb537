"""The option about what a run writes down of itself."""

from dataclasses import dataclass

from holdfast.losses.options import option


@dataclass(kw_only=True)
class RecordOptions:
    """Options about the record of a run. `DPOConfig` inherits them."""

    run_record: bool = option(
        True,
        "Write what the run is made of and what it logs into `record/` in output_dir (JSON), for `holdfast report`.",
    )
