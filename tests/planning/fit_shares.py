"""Makes ringbpt/shares.json: what is reached of each peak, fitted to the published runs that are marked so.

    python -m tests.planning.fit_shares

For each generation and stack, one share of matrix products and one of attention for each head dim, by least squares of
log(measured / modelled), outliers weighing less. The bracket of a share is what its runs need: those of which most is
attention for attention's, the others for the products', MARGIN more on either side, and at least LEAST. No run that is
left out is looked at.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from ringbpt.rates import FILE
from tests.planning.published import Run, published

MARGIN, LEAST, WIDEST = 1.04, 1.10, 1.58
PRIOR = {"matmul": 0.65, "attention": 0.5}  # and how little it counts: a tenth of a run
# Kernels that are fitted together, since they are equally quick: FlashAttention 3 and cuDNN's on Hopper.
TOGETHER = {"pallas_hopper": "cudnn"}
# Rows that go by other names too, (of products, of attention): what `auto` takes, and kernels of the same kind that
# nobody has published a run of.
ALSO = {
    ("H100", "cudnn"): (("pallas_hopper", "auto"), ("pallas_hopper", "auto")),
    ("A100", "triton of 2022"): (("pallas_triton", "cudnn", "auto"), ("pallas_triton",)),
    ("A100", "flash-attn 2, update by the CPU"): ((), ("cudnn", "auto")),
}
# What nobody has published runs of. Blocks in plain XLA write each block of scores out.
ASSUMED = {"share": [0.35, 0.08], "from": "assumed"}
BETWEEN = "no published run of this generation: "


def modelled(run: Run, attention: float, matmul: float) -> tuple[float, float]:
    """(seconds of attention, of everything else) at these shares, rates half way, transfers that may hide hidden."""
    peak, work = run.known.bf16_tflops * 1e12, run.work
    rate = math.sqrt(math.prod(work.hop_rate))
    rings = sum(
        max(p.flops, p.flops + peak * attention * p.behind / rate - p.flops * p.share_behind) / (peak * attention)
        for p in work.passes
    )
    return rings, work.dense / (peak * matmul) + math.sqrt(math.prod(work.waits)) + work.after / 22e9


def stack(run: Run) -> tuple[str, str]:
    return run.known.generation, TOGETHER.get(run.kernel, run.kernel)


def fit(runs: Sequence[Run]) -> tuple[float, dict[int, float]]:
    """(the share of matrix products, {head dim: of attention})."""
    heads = sorted({run.architecture.head_dim for run in runs})

    def residuals(logs: np.ndarray) -> list[float]:
        shares = dict(zip(heads, np.exp(logs[1:]), strict=True))
        found = [
            math.log(run.seconds / sum(modelled(run, shares[run.architecture.head_dim], math.exp(logs[0]))))
            for run in runs
        ]
        return found + [0.1 * (log - math.log(PRIOR[k])) for log, k in zip(logs, names, strict=True)]

    names = ["matmul", *("attention" for _ in heads)]
    solved = least_squares(residuals, [math.log(PRIOR[name]) for name in names], loss="soft_l1", f_scale=0.1).x
    return math.exp(solved[0]), dict(zip(heads, map(math.exp, solved[1:]), strict=True))


def pair(share: float, ratios: Sequence[float]) -> list[float]:
    """[at best, at worst] from measured / modelled of the runs that it is for."""
    quick, slow = min([1 / LEAST, *(r / MARGIN for r in ratios)]), max([LEAST, *(r * MARGIN for r in ratios)])
    if slow / quick > WIDEST:
        middle = math.sqrt(quick * slow)
        quick, slow = middle / math.sqrt(WIDEST), middle * math.sqrt(WIDEST)
    return [round(min(share / quick, 0.9), 3), round(share / slow, 3)]


def sources(runs: Sequence[Run]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) > 1)} of " + "; ".join(sorted({run.table for run in runs}))


def made(runs: list[Run]) -> dict:
    table: dict = {"matmul": {}, "attention": {}}
    for name in sorted({stack(run) for run in runs}):
        of_name = [run for run in runs if stack(run) == name]
        matmul, heads = fit(of_name)
        ratios: dict[int, list[float]] = {head: [] for head in (0, *heads)}
        for run in of_name:
            head = run.architecture.head_dim
            attention, rest = modelled(run, heads[head], matmul)
            ratios[head if attention > rest else 0].append(run.seconds / (attention + rest))
        generation, kernel = name
        entry = {
            str(head): {
                "share": pair(share, ratios[head]),
                "from": sources([r for r in of_name if r.architecture.head_dim == head]),
            }
            for head, share in heads.items()
        }
        also = ALSO.get(name, (("auto",), ("auto",)) if kernel == "pallas_tpu" else ((), ()))
        products = {"share": pair(matmul, ratios[0]), "from": sources(of_name)}
        for kind, found, names in (("matmul", products, also[0]), ("attention", entry, also[1])):
            for each in (kernel, *names):
                table[kind].setdefault(generation, {})[each] = found
    return table


def completed(table: dict) -> dict:
    """With rows for what was not measured: a TPU's other head dim in v7x's proportion, other generations, blocks."""
    attention, matmul = table["attention"], table["matmul"]
    heads = {head: entry["share"] for head, entry in attention["v7x"]["pallas_tpu"].items()}
    for generation in ("v5p", "v6e"):
        for name in ("pallas_tpu", "auto"):
            entries = attention[generation][name]
            [(known, entry)] = [each for each in entries.items() if "derived" not in each[1]["from"]]
            other = next(head for head in heads if head != known)
            share = [
                round(min(0.9, x * a / b), 3)
                for x, a, b in zip(entry["share"], heads[other], heads[known], strict=True)
            ]
            entries[other] = {"share": share, "from": f"derived from heads of {known} in v7x's proportion"}
    for platform, of in (("tpu", ("v5p", "v6e", "v7x")), ("gpu", ("A100", "H100"))):
        why = BETWEEN + "as those of " + ", ".join(of)
        products = [x for generation in of for x in matmul[generation]["auto"]["share"]]
        scores = [x for generation in of for x in attention[generation]["auto"]["128"]["share"]]
        matmul[platform] = {"auto": {"share": _narrow(products), "from": why}}
        attention[platform] = {"auto": {"128": {"share": _narrow(scores), "from": why}}, "blockwise": {"128": ASSUMED}}
    for generation in list(attention):
        attention[generation]["blockwise"] = {"128": ASSUMED}
    return table


def _narrow(shares: Sequence[float]) -> list[float]:
    """The middle of a range, WIDEST at most."""
    middle = math.sqrt(min(shares) * max(shares))
    reach = min(math.sqrt(WIDEST), max(shares) / middle)
    return [round(middle * reach, 3), round(middle / reach, 3)]


def written(table: dict) -> str:
    """One row a line, as a diff is read."""
    kinds = []
    for kind, generations in table.items():
        rows = []
        for generation, kernels in generations.items():
            entries = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in kernels.items())
            rows.append(f"  {json.dumps(generation)}: {{\n{entries}\n  }}")
        kinds.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


if __name__ == "__main__":
    found = completed(made([run for run in published() if run.fit]))
    FILE.write_text(written(found))
