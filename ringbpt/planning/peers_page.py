"""docs/peers.md and its picture, written from what is known of both sides' programs (planning.beside)."""

from collections import Counter
from pathlib import Path
from typing import Any

from ringbpt.planning.beside import LONGEST, ROWS, SIDES, sides
from ringbpt.planning.report import size


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def cells(found: dict[str, Any] | None) -> list[str]:
    """Of one side: memory, sent in all, by attention, by the rest, exposed, and hops with those that hide."""
    if found is None or "refused" in found:
        return ["" if found is None else "refused", *[""] * 5]
    if "attention" not in found:
        return [f"{_gib(found['total'])}, too much", *[""] * 5]
    sent = found["attention"] + found["rest"]
    exposed = f"{_gib(found['exposed']['attention'])} + {_gib(found['exposed']['rest'])}"
    hops = f"{found['hidden']:,} of {found['hops']:,}" if found["hops"] else "none"
    return [*map(_gib, (found["total"], sent, found["attention"], found["rest"])), exposed, hops]


HEAD = """# Beside MaxText

One train step of Llama-2-7B, one sequence, by this house and by [MaxText](https://pypi.org/project/maxtext/), each
compiled ahead of time for TPUs that were not there: nothing was run, and nothing here is a time. One compiler makes
both for the same devices, and one reader reads both programs. Weights and AdamW are in float32, products in bfloat16;
nothing is kept of a layer but its input; tokens stand in the order by which all devices have the same work. The devices
share the one sequence, and the weights are dealt out over them. The rest of MaxText's settings are its own, but for two
that its runs of long sequences were published with: the queries' gradients in three parts, and blocks of 1,024. Without
them it needs more memory in a ring, as *its defaults* say. Ours takes the feedforward in chunks of 4,096 tokens, and
attention a few heads at a time where heads are not what is dealt out: two in a ring, eight by `all_gather`
(`--llama.kv_heads_at_a_time`: MaxText has no such flag).
[ringbpt/planning/beside.py](../ringbpt/planning/beside.py) has every flag of both. Made by {versions}.

<!-- test: make -->
```bash
make peers                            # what is missing below, a night of compiling; it goes on where it was stopped
make peers ARGS="--only='v5p-16 32K'"
```

![Memory of a device, and what it sends in a step, here and by MaxText](peers.png)

Of one device, in GiB. *Memory*: as the compiler's own assignment of buffers says, which is what has to fit;
`memory_analysis()` says more of both. *Sent*: in one step; *attention*: keys, values and their gradients; *the rest*:
weights, their gradients, the embedding. *Exposed*: of these two, what no product and no kernel is scheduled behind.
*Hops*: of a ring, and those behind a kernel of attention. All by count: that a kernel lasts as long as its hop is not
said.

| | by | memory | sent | attention | the rest | exposed | hops hidden |
|---|---|---|---|---|---|---|---|"""


def page(known: dict[str, Any]) -> str:
    """The text of docs/peers.md."""
    found = [side for row in known.values() for side in row.values()]
    packages = sorted({package for side in found for package in side["with"].split(", ")})
    lines = HEAD.replace("{versions}", ", ".join(packages)).splitlines()
    rows = [name for name in ROWS if name in known and LONGEST not in name]
    every = [(name, side, known.get(name, {}).get(side)) for name in ROWS for side in sides(name)]
    for name in rows:
        for side in sides(name):
            lines.append(
                f"| {name if side == 'ours' else ''} | {SIDES[side]} | {' | '.join(cells(known[name].get(side)))} |"
            )
    sent = [f"- {name}, {SIDES[side]}: {kinds(found)}" for name, side, found in every if found and "sent" in found]
    far = [
        f"- {name.replace(' longest', ',')}, {SIDES[side]}: {found['tokens']:,} tokens fit, in {size(found['total'])}"
        for name, side, found in every
        if found and "tokens" in found
    ]
    refused = [
        f"- {name}, {SIDES[side]}: {found['refused']}" for name, side, found in every if found and "refused" in found
    ]
    absent = {name: [SIDES[side] for side in sides(name) if side not in known.get(name, {})] for name in ROWS}
    for title, part in (
        ("What is sent", sent),
        ("How long a sequence fits", far),
        ("What is refused", refused),
        ("Not compiled yet", [f"- {name}: {', '.join(by)}" for name, by in absent.items() if by]),
    ):
        if part:
            lines += ["", f"## {title}", "", *part]
    return "\n".join(lines) + "\n"


def kinds(found: dict[str, Any]) -> str:
    """What is sent in which dtype, from a hundredth of all on: "44.0 GiB collective-permute bf16 of attention"."""
    sent = Counter(found.get("sent", {}))
    large = [(what.partition(" ")[2], count) for what, count in sent.most_common() if count > 0.01 * sent.total()]
    return ", ".join(f"{_gib(count)} {what}" for what, count in large)


def draw(known: dict[str, Any], path: Path) -> None:
    """Bars for each row, ours on top: memory on the left; on the right what is sent, the exposed part darker."""
    from matplotlib.figure import Figure

    rows = [name for name in ROWS if any("attention" in side for side in known.get(name, {}).values())]
    figure = Figure(figsize=(11, 1.8 + 0.7 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = (("#155a73", "#8cc4d6"), ("#a8481f", "#ecb79c"), ("#6b6b6b", "#c9c9c9"))
    for offset, (side, by), (dark, light) in zip((-0.27, 0, 0.27), SIDES.items(), colors, strict=True):
        found = {place: known[name].get(side, {}) for place, name in enumerate(rows)}
        found = {place: side for place, side in found.items() if "attention" in side}
        places = [place + offset for place in found]
        exposed = [sum(side["exposed"].values()) / 2**30 for side in found.values()]
        hidden = [
            (side["attention"] + side["rest"]) / 2**30 - e for side, e in zip(found.values(), exposed, strict=True)
        ]
        left.barh(places, [side["total"] / 2**30 for side in found.values()], 0.25, color=light, label=by)
        right.barh(places, exposed, 0.25, color=dark, label=f"{by}: exposed")
        right.barh(places, hidden, 0.25, left=exposed, color=light, label=f"{by}: behind a product or a kernel")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel("GiB of one device")
    right.set_xlabel("GiB that one device sends in a step")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
