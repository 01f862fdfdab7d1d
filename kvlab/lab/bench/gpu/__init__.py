"""What a GPU changes: prefill and decode, copies and conversions, the way of a block, and the choices of the planner.

python -m kvlab bench gpu --json >docs/results/gpu-<name>.json

One command, no network, no server, at most eight minutes: what does not fit into the time or into the memory is
skipped and named, a step that fails is named too, and everything else is still measured. Without a GPU the same steps
run on the CPU, with small models, which is how they are tested. Models in published shapes have random weights, which
take the same time as learned ones.

    plan      what is measured: shapes, lengths, sizes       report    rows, the time that remains, what was left out
    limits    a copy and a matmul; attention kernels         compute   prefill and decode
    moving    copies, conversions, the load path             serving   time to first token, the planner's choices
"""

from kvlab.lab.bench.gpu.command import run
from kvlab.lab.bench.gpu.plan import PLANS, Plan

__all__ = ["PLANS", "Plan", "run"]
