"""Time of a training step by kind of operator, on a CPU.

    python benchmarks/step_profile.py [--precision FP32] [--method Full] [--steps 3]

Self time of PyTorch's operators over some steps of the 8.5 M parameter Llama of
``tokens_per_second.py``. Also prints the operations on real tokens per second as a share of the
machine's matrix-multiply rate.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile
from trainers import SHAPES, Ours, documents, matmul_rate

SHAPE = SHAPES["8M"]
KINDS: Final = {
    "matrix products": r"aten::(mm|addmm|bmm|linear)$|MmBackward",
    "attention kernels": r"flash_attention_for_cpu",
    "loss of the logits": (
        r"log_softmax|nll_loss|LogSoftmax|Nll|InPlaceCrossEntropy|aten::(gather|scatter_add_|exp_)$"
    ),
    "elementwise (norms, rotary, activations, residuals)": (
        r"aten::(mul|add|sub|neg|pow|rsqrt|mean|sum|div|silu|silu_backward|cos|sin)$"
    ),
    "sums of gradients": r"aten::(add_|mul_|div_)$|AccumulateGrad",
    "copies, gathers, zeros": (
        r"aten::(copy_|cat|index\w*|_?to\w*|fill_|zero_|select_backward|embedding\w*)$"
        r"|SelectBackward|Index\w*Backward"
    ),
    "optimizer": r"_fused_adam|foreach|Optimizer",
}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="FP32")
    parser.add_argument("--method", default="Full")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    ours = Ours(arguments.method, documents(2000, SHAPE), SHAPE, precision=arguments.precision)
    ours.turn(2)
    speed = ours.turn(arguments.steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours.turn(arguments.steps)
    dtype = torch.float32 if arguments.precision == "FP32" else torch.bfloat16
    rate = matmul_rate(dtype, torch.device("cpu"))
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    print(f"{arguments.method}, {arguments.precision}: {speed:,.0f} tokens/s,"
          f" {speed * ours.operations() / rate:.0%} of the matrix-multiply rate\n")  # fmt: skip
    print("| operators | share of a step |\n|---|---|")
    for kind, spent in times.most_common():
        print(f"| {kind} | {spent / times.total():.1%} |")


if __name__ == "__main__":
    main()
