"""`python -m ringbpt.verify <flags of ringbpt.train>`: is the step the same on other meshes, layouts, strategies?

One step of the given configuration is run again along every dimension in which a run may differ without its numbers
differing; each loss and each group of gradients is compared with the plainest program there is (one device, dense
attention, a Python loop over layers). The table goes to the terminal; exit code 1 where a tolerance is passed, and a
line that says along which dimension the numbers part.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringbpt.config import (
    Config,
    Flag,
    UserError,
    check,
    check_folders,
    parse,
    parse_args,
    printed_help,
    run_main,
    split_flags,
)
from ringbpt.dims import MeshShape

if TYPE_CHECKING:
    from ringbpt.types import Batch

GROUPS = {
    "embedding": ("embed", "unembed"),
    "attention": ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v"),
    "feedforward": ("w_gate", "w_up", "w_down", "w_router"),
    "norms": ("attention_norm", "feedforward_norm", "norm", "q_norm", "k_norm"),
}
FLAGS = {
    "tolerance": Flag(float, 0.0, "the largest relative difference; 0: 1e-5 in float32, 2e-2 in bfloat16"),
    "json": Flag(str, "", "the report as JSON"),
    "real_devices": Flag(bool, False, "on the devices at hand instead of 8 virtual CPU devices"),
}


@dataclass(frozen=True)
class Variant:
    """One way of computing the same step; the fields are the dimensions along which numbers could part."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    sp: int = 1
    layout: str = "contiguous"
    strategy: str = "none"
    ring: str = "whole"  # or "skipping" hops, or "two ways"
    local: str = "standard"
    kernel: str = "auto"
    packing: str = "as given"  # or "alone": each document in a row of its own
    accumulate: int = 1
    layers: str = "loop"
    feedforward: str = "whole"
    remat: str = ""
    heads: int | None = None  # kv heads at a time, whole layers in blocks; None: layers in pieces, all heads at once

    def apply(self, config: Config) -> Config:
        """The config with this variant's choices. Raises UserError where they don't fit the model or the data."""
        ring = self.strategy != "none"
        execution = replace(
            config.execution,
            sequence_layout=self.layout,
            attention_type=f"ring_{self.local}" if ring else self.local,
            attention_kernel=self.kernel,
            sequence_parallel=self.strategy if ring else "ring",
            ulysses_degree=2 if self.strategy == "ulysses_ring" else None,
            heads_k_stride=None,
            ring_bidirectional=self.ring == "two ways",
            ring_skip_hops=self.ring == "skipping",
            scan_layers=self.layers == "scanned",
            scan_mlp=self.feedforward == "blockwise",
            remat_block=self.remat,
            kv_heads_at_a_time=self.heads,
        )
        config = replace(
            config,
            mesh_shape=MeshShape(self.dp, self.fsdp, self.tp, self.sp),
            execution=execution,
            eval_steps=0,
            optimizer=replace(config.optimizer, accumulate_gradient_steps=self.accumulate),
        )
        check(config)
        return config


def given_variant(config: Config) -> Variant:
    """The configuration as it was asked for, as a variant."""
    execution = config.execution
    ring = execution.attention_type.startswith("ring")
    return Variant(
        *config.mesh_shape,
        layout=execution.sequence_layout,
        strategy=execution.sequence_parallel if ring else "none",
        ring="two ways" if execution.ring_bidirectional else "skipping" if execution.ring_skip_hops else "whole",
        local=execution.attention_type.removeprefix("ring_"),
        kernel=execution.attention_kernel,
        accumulate=config.optimizer.accumulate_gradient_steps,
        layers="scanned" if execution.scan_layers else "loop",
        feedforward="blockwise" if execution.scan_mlp else "whole",
        remat=execution.remat_block,
        heads=execution.kv_heads_at_a_time,
    )


def variants(config: Config, device_count: int) -> list[Variant]:
    """The given one; it with each other value of each dimension; and the other meshes with each layout."""
    import jax

    from ringbpt.attention.api import FASTEST, OVER_SP
    from ringbpt.layouts import LAYOUTS

    given = given_variant(config)
    wanted = [given]
    choices: dict[str, tuple[Any, ...]] = {
        "layout": LAYOUTS,
        "strategy": tuple(name for name in OVER_SP if name != "none"),
        "ring": ("skipping", "two ways"),
        "local": ("standard", "blockwise"),
        "kernel": FASTEST.get(jax.default_backend(), ()),  # on a CPU, those that are asked for
        "packing": ("alone",),
        "accumulate": (1, 2, 4),
        "layers": ("loop", "scanned"),
        "feedforward": ("whole", "blockwise"),
        "remat": ("", "nothing_saveable", "save_attention", "dots_saveable"),
        "heads": (None,),
    }
    for name, values in choices.items():
        for value in values:
            changed: dict[str, Any] = {name: value} | ({"kernel": "auto"} if name == "local" else {})
            wanted.append(replace(given, **changed))
    n = device_count
    meshes = [(1, 1, 1, n), (1, n, 1, 1), (n, 1, 1, 1), (1, 2, 2, n // 4), (2, 2, 1, n // 4), (2, 1, 1, n // 2)]
    for mesh, layout in product(meshes, LAYOUTS):
        if math.prod(mesh) <= n and 0 not in mesh and (mesh[3] > 1 or layout == "contiguous"):
            strategy = given.strategy if given.strategy != "none" or mesh[3] == 1 else "ring"
            wanted.append(
                replace(given, dp=mesh[0], fsdp=mesh[1], tp=mesh[2], sp=mesh[3], layout=layout, strategy=strategy)
            )
    wanted += [replace(v, strategy=s) for v in wanted[-1:] for s in ("all_gather", "ulysses")]
    wanted.append(replace(given, layout="contiguous", ring="skipping"))  # where short documents leave hops out
    return [variant for variant in dict.fromkeys(wanted) if _fits(variant, config)]


def _fits(variant: Variant, config: Config) -> bool:
    try:
        variant.apply(config)
    except UserError:
        return False
    return True


def alone(batch: "Batch", rows: int) -> "Batch":
    """Each document of a packed host batch in a row of its own, padded; `rows` divides the number of rows."""
    from ringbpt.data.documents import make_batch, pieces_of

    by_row = [{name: array[row] for name, array in batch.by_name().items()} for row in range(len(batch.token_BT))]
    documents = [[document] for row in by_row for document in pieces_of(row)]
    shape = (-(-len(documents) // rows) * rows, batch.token_BT.shape[1])
    return make_batch(documents, shape, tuple(batch.by_name()))


def step_numbers(config: Config, host: "Batch", seed: int) -> dict[str, Any]:
    """{"loss": float, group: the gradients of its weights as one float64 vector} of one step."""
    import jax
    import numpy as np

    from ringbpt.mesh import make_mesh, put_batch
    from ringbpt.model.llama import Model
    from ringbpt.objectives import objective_of
    from ringbpt.training.step import make_gradients

    model = Model.of(config, make_mesh(config.mesh_shape))
    model.check_kernel(config.train_dataset.seq_length)
    batch = put_batch(host.rows, host.token_BT.shape, model.mesh, config.execution.sequence_layout)
    params = model.init(jax.random.key(seed))
    grads, values = jax.jit(make_gradients(config, model, objective_of(config)))(params, batch)
    numbers: dict[str, Any] = {"loss": float(values["loss"])}
    leaves = {path[-1].key: np.asarray(x, np.float64).ravel() for path, x in jax.tree.leaves_with_path(grads)}
    assert leaves.keys() <= set(chain(*GROUPS.values())), "a weight that no group compares"
    for group, names in GROUPS.items():
        numbers[group] = np.concatenate([leaves[name] for name in names if name in leaves])
    return numbers


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """{"loss": relative difference, group: ||got - want|| / ||want||, "group norm", "group direction": 1 - cosine}."""
    import numpy as np

    found = {"loss": abs(got["loss"] - want["loss"]) / abs(want["loss"])}
    for group in GROUPS:
        a, b = got[group], want[group]
        norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        found[group] = float(np.linalg.norm(a - b)) / max(norm_b, 1e-30)
        found[f"{group} norm"] = abs(norm_a / max(norm_b, 1e-30) - 1)
        found[f"{group} direction"] = 1 - float(a @ b) / max(norm_a * norm_b, 1e-30)
    return {name: value if math.isfinite(value) else math.inf for name, value in found.items()}


def parting(passed: list[Variant], failed: list[Variant]) -> list[str]:
    """The fewest dimensions whose values tell the failed from the passed: ["sp, strategy: 8 ring"]."""
    for count in (1, 2, 3):
        lines = []
        for names in combinations(asdict(Variant()), count):
            bad, good = ({tuple(getattr(v, name) for name in names) for v in group} for group in (failed, passed))
            if bad and not bad & good:
                shown = sorted(" ".join(str(value) or "none" for value in values) for values in bad)
                lines.append(f"{', '.join(names)}: {'; '.join(shown)}")
        if lines:
            return lines
    return []


def verify(config: Config, device_count: int, tolerance: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every variant and compares; the report as a JSON-serialisable dict with "ok" and "parting"."""
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.training.loop import loader_of

    loader = loader_of(config, make_tokenizer(config.tokenizer))
    host = loader.rows(0, 0, loader.batch_size)
    plain = Variant()
    todo = variants(config, device_count)
    say(f"{len(todo)} variants against the plainest; tolerance {tolerance:g}; {loader.describe()}")
    want = step_numbers(plain.apply(config), host, config.seed)
    rows, compared, started = [], [], time.perf_counter()
    for i, variant in enumerate(todo):
        divisor = variant.dp * variant.fsdp * variant.accumulate
        batch = alone(host, divisor) if variant.packing == "alone" else host
        try:
            numbers = step_numbers(variant.apply(config), batch, config.seed)
        except UserError as refusal:  # a kernel that cannot do this; where it was asked for, that is the answer
            if variant.kernel == config.execution.attention_kernel:
                raise
            say(f"skip {refusal}")
            continue
        compared.append(variant)
        found = differences(numbers, want)
        worst = max(value for name, value in found.items() if "direction" not in name)
        rows.append({"variant": asdict(variant), "differences": found, "worst": worst, "ok": worst <= tolerance})
        left = (time.perf_counter() - started) / (i + 1) * (len(todo) - i - 1)
        say(f"{'ok  ' if rows[-1]['ok'] else 'FAIL'} {_line(variant, plain, found)}  ({left:.0f} s left)")
    failed = [variant for variant, row in zip(compared, rows, strict=True) if not row["ok"]]
    passed = [plain, *(variant for variant, row in zip(compared, rows, strict=True) if row["ok"])]
    report = {"tolerance": tolerance, "loss": want["loss"], "rows": rows, "ok": not failed}
    return report | {"parting": parting(passed, failed)}


def _line(variant: Variant, plain: Variant, found: dict[str, float]) -> str:
    changed = {name: value for name, value in asdict(variant).items() if value != getattr(plain, name)}
    what = " ".join(f"{name}={value}" for name, value in changed.items())
    groups = "  ".join(f"{name} {found[name]:.1e}" for name in ("loss", *GROUPS))
    return f"{groups}  {what}"


def main(argv: list[str]) -> int:
    if printed_help(argv, "verify", __doc__, FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    check_folders(own, "json")
    tree = parse_args(rest)
    import jax

    from ringbpt.mesh import start_jax

    if not own["real_devices"]:
        jax.config.update("jax_platforms", "cpu")
        tree.num_cpu_devices = tree.num_cpu_devices or 8
    device_count = start_jax(tree)
    config = parse(tree, device_count)
    tolerance = own["tolerance"] or (1e-5 if config.dtype == "fp32" else 2e-2)
    report = verify(config, device_count, tolerance)
    if own["json"]:
        Path(own["json"]).expanduser().write_text(json.dumps(report, indent=1) + "\n")
    bad = sum(not row["ok"] for row in report["rows"])
    for line in report["parting"]:
        print(f"the numbers part along {line}")
    print(f"{len(report['rows']) - bad} of {len(report['rows'])} variants agree with the plainest to {tolerance:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
