"""The DPO paper's controlled experiment in miniature: `run_demo` trains with each reference and checks what comes out.

`world` (source, reward, labels) <- `policy` (start policy, measurements) <- `frontier` (what is possible) <- `results`
(records) <- `checks`, `table`, `plot` <- `experiment` (all of it in order).
"""

from holdfast.demo.experiment import run_demo
from holdfast.demo.results import DemoResult

__all__ = ["DemoResult", "run_demo"]
