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
from typing import TYPE_CHECKING, Any

from ringbpt.config import (
    JSON,
    Config,
    Execution,
    Flag,
    UserError,
    check,
    check_folders,
    json_to,
    parse,
    parse_args,
    printed_help,
    run_main,
    split_flags,
)
from ringbpt.dims import AXES, MeshShape

if TYPE_CHECKING:
    from ringbpt.data.loader import Loader
    from ringbpt.model.llama import Model
    from ringbpt.types import Batch, Params

GROUPS = {
    "embedding": ("embed", "unembed", "score"),
    "attention": ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v"),
    "feedforward": ("w_gate", "w_up", "w_down", "w_router"),
    "norms": ("attention_norm", "feedforward_norm", "norm", "q_norm", "k_norm"),
}
FLAGS = {
    "tolerance": Flag(float, 0.0, "the largest relative difference; 0: 1e-5 in float32, 2e-2 in bfloat16", at_least=0),
    "json": JSON,
    "real_devices": Flag(bool, False, "on the devices at hand instead of 8 virtual CPU devices"),
}


@dataclass(frozen=True)
class Variant:
    """One way of computing the same step. packing "alone": each unit (a document, a pair) in a row of its own, "apart":
    nothing that documents share stands in a row once.
    """

    mesh: MeshShape
    execution: Execution
    accumulate_gradient_steps: int = 1
    packing: str = "as given"

    def dims(self) -> dict[str, Any]:
        """What the numbers could part along, by the flags' names."""
        rest = {"accumulate_gradient_steps": self.accumulate_gradient_steps, "packing": self.packing}
        return {**self.mesh._asdict(), **asdict(self.execution), **rest}

    def but(self, **changes: Any) -> "Variant":
        """This one with other values of some of its dims."""
        dims = self.dims() | changes
        mesh = MeshShape(*(dims.pop(axis) for axis in AXES))
        execution = Execution(**{name: dims.pop(name) for name in asdict(self.execution)})
        return Variant(mesh, execution, **dims)

    def apply(self, config: Config) -> Config:
        """The config with this variant's choices. Raises UserError where they don't fit the model or the data."""
        optimizer = replace(config.optimizer, accumulate_gradient_steps=self.accumulate_gradient_steps)
        config = replace(config, mesh_shape=self.mesh, execution=self.execution, eval_steps=0, optimizer=optimizer)
        check(config)
        return config


def plainest(config: Config) -> Variant:
    """One device, dense attention, a Python loop over layers, nothing in blocks but the loss."""
    plain: dict[str, Any] = {"attention_type": "standard", "sequence_layout": "contiguous", "scan_layers": False}
    return Variant(MeshShape(), Execution(**plain, loss_chunk_size=config.execution.loss_chunk_size))


def variants(config: Config, device_count: int) -> list[Variant]:
    """The given one; it with each other value of each dimension; and the other meshes with each layout."""
    import jax

    from ringbpt.attention.api import FASTEST, OVER_SP
    from ringbpt.layouts import LAYOUTS

    given = Variant(config.mesh_shape, config.execution, config.optimizer.accumulate_gradient_steps)
    ring, kind = given.execution.attention_type.rpartition("ring_")[1:]

    def over_sp(strategy: str) -> dict[str, Any]:
        return {
            "attention_type": f"ring_{kind}",
            "sequence_parallel": strategy,
            "ulysses_degree": 2 if strategy == "ulysses_ring" else None,
            "heads_k_stride": None,
        }

    n, parallel = device_count, given.execution.sequence_parallel if ring else "ring"
    meshes = [(1, 1, 1, n), (1, n, 1, 1), (n, 1, 1, 1), (1, 2, 2, n // 4), (2, 2, 1, n // 4), (2, 1, 1, n // 2)]
    elsewhere = [
        given.but(**dict(zip(AXES, mesh, strict=True)), sequence_layout=layout, **over_sp(parallel))
        for mesh, layout in product(meshes, LAYOUTS)
        if math.prod(mesh) <= n and 0 not in mesh and (mesh[3] > 1 or layout == "contiguous")
    ]
    skipping = {"ring_skip_hops": True, "ring_bidirectional": False}
    changes: list[dict[str, Any]] = [
        *({"sequence_layout": layout} for layout in LAYOUTS),
        *(over_sp(strategy) for strategy in OVER_SP if strategy != "none"),
        *(skipping, {"ring_skip_hops": False, "ring_bidirectional": True}),
        *({"attention_type": ring + name, "attention_kernel": "auto"} for name in ("standard", "blockwise")),
        # On a CPU, those that are asked for.
        *({"attention_kernel": kernel} for kernel in FASTEST.get(jax.default_backend(), ())),
        *({"packing": packing} for packing in ("alone", "apart")),
        *({"accumulate_gradient_steps": count} for count in (1, 2, 4)),
        *({"scan_layers": scanned} for scanned in (False, True)),
        *({"scan_mlp": blockwise} for blockwise in (False, True)),
        *({"remat_block": policy} for policy in ("", "nothing_saveable", "save_attention", "dots_saveable")),
        {"kv_heads_at_a_time": None},
        {"gathered_weights": "keep"},
        {"sequence_layout": "contiguous", **skipping},  # where short documents leave hops out
    ]
    wanted = [given, *(given.but(**change) for change in changes), *elsewhere]
    wanted += [elsewhere[-1].but(**over_sp(strategy)) for strategy in ("all_gather", "ulysses")]
    wanted.append(elsewhere[-1].but(accumulate_gradient_steps=2))  # sums over dp wait for the step's end
    return [variant for variant in dict.fromkeys(wanted) if _fits(variant, config)]


def _fits(variant: Variant, config: Config) -> bool:
    try:
        variant.apply(config)
    except UserError:
        return False
    return True


def repacked(batch: "Batch", packing: str, rows: int) -> "Batch":
    """The documents of a packed host batch, whole, with nothing shared: "apart" in the rows that they were in, "alone"
    each unit in a row of its own, of which `rows` divides the number. Rows are as many times as long as they must be.
    """
    from ringbpt.data.documents import make_batch, pieces_of

    columns = tuple(name for name in batch.by_name() if name != "last")
    found: list[list[Any]] = []
    for row in range(len(batch.token_BT)):
        pieces = pieces_of({name: array[row] for name, array in batch.by_name().items()}, apart=True)
        if packing == "apart":
            found.append(pieces)
            continue
        for number, piece in enumerate(pieces):
            if number and piece.unit is not None and piece.unit == pieces[number - 1].unit:
                found[-1].append(piece)
            else:
                found.append([piece])
    longest, T = max(sum(piece.length for piece in pieces) for pieces in found), batch.token_BT.shape[1]
    return make_batch(found, (-(-len(found) // rows) * rows, -(-longest // T) * T), columns)


def filled_up(batch: "Batch", rows: int) -> "Batch":
    """The host batch with rows of padding behind its own, until `rows` divides their number."""
    import numpy as np

    from ringbpt.types import COLUMNS, Batch

    more = -len(batch.token_BT) % rows
    return Batch.of(
        {
            name: np.pad(array, ((0, more), (0, 0)), constant_values=COLUMNS[name].padding)
            for name, array in batch.by_name().items()
        }
    )


def with_reference(config: Config, host: "Batch", seed: int) -> "Batch":
    """The host batch with what another model says of it, by the plainest program, as the reference's column."""
    import jax
    import numpy as np

    from ringbpt.mesh import make_mesh
    from ringbpt.model.llama import Model
    from ringbpt.objectives.objective import REFERENCE

    model = Model.of(config, make_mesh(config.mesh_shape))
    batch = model.put_batch(host.rows, host.token_BT.shape)
    logp_BT = jax.jit(lambda params, b: model.token_stats(params, b).logp_BT)(model.init(jax.random.key(seed)), batch)
    return replace(host, columns=host.columns | {REFERENCE: np.asarray(logp_BT)})


def first_batch(loader: "Loader") -> "Batch":
    """The first host batch in which some token takes loss. Raises UserError where an epoch has none."""
    for step in range(loader.steps_per_epoch):
        batch = loader.rows(step, 0, loader.batch_size)
        if batch.weight_BT.any():
            return batch
    raise UserError("no batch of an epoch has a token that takes loss: there is nothing to compare")


def first_weights(config: Config, model: "Model", seed: int) -> tuple["Params", "Params"]:
    """(trained, frozen) of a run's first step, but for adapters: theirs are drawn whole, or half of them would have no
    gradient and no effect.
    """
    import jax

    from ringbpt.model.adapters import B
    from ringbpt.training.state import StateLayout, divide

    layout, params = StateLayout(config, model), model.init(jax.random.key(seed))
    trained, frozen = divide(params, layout.is_frozen)
    for number, name in enumerate(sorted(params["layers"])):
        if name.endswith(B):
            w = (
                jax.random.normal(jax.random.key(number), params["layers"][name].shape)
                * config.architecture.initializer_range
            )
            trained["layers"][name] = jax.device_put(w, model.shardings["layers"][name])
    return trained, layout.kept(frozen)


def step_numbers(config: Config, host: "Batch", seed: int) -> dict[str, Any]:
    """{"loss": float, "metrics": all that is measured of a whole step, group: its weights' gradients as one float64
    vector}; of a group that stays there are none.
    """
    import jax
    import numpy as np

    from ringbpt.mesh import make_mesh
    from ringbpt.model.adapters import SCALE, A, B
    from ringbpt.model.llama import Model
    from ringbpt.objectives import objective_of
    from ringbpt.objectives.balance import of_the_rows_at_hand
    from ringbpt.training.step import make_gradients

    model = Model.of(config, make_mesh(config.mesh_shape))
    model.check_kernel(config.train_dataset.seq_length, "last" in host.columns)
    batch = model.put_batch(host.rows, host.token_BT.shape)
    trained, frozen = first_weights(config, model, seed)
    objective = objective_of(config)
    grads, means = jax.jit(make_gradients(config, model, objective))(trained, batch, frozen)
    values = objective.values(jax.device_get(means), config)
    compared = {name: values[name] for name in values.keys() - of_the_rows_at_hand(config)}
    numbers: dict[str, Any] = {"loss": values["loss"], "metrics": compared}
    leaves = {path[-1].key: np.asarray(x, np.float64).ravel() for path, x in jax.tree.leaves_with_path(grads)}
    # An adapter's weights stand with the weight that they are beside.
    grouped = {group: [name + part for name in names for part in ("", A, B, SCALE)] for group, names in GROUPS.items()}
    assert leaves.keys() <= set(chain(*grouped.values())), "a weight that no group compares"
    for group, names in grouped.items():
        if found := [leaves[name] for name in names if name in leaves]:
            numbers[group] = np.concatenate(found)
    return numbers


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """{"loss": relative difference, "metrics": the largest, group: ||got - want|| / ||want||, "group norm", "group
    direction": 1 - cosine}. A metric below 1 is compared by what it is, and not by its share.
    """
    import numpy as np

    found = {"loss": abs(got["loss"] - want["loss"]) / abs(want["loss"])}
    pairs = [(got["metrics"].get(name, math.inf), value) for name, value in want["metrics"].items()]
    found["metrics"] = max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)
    for group in (group for group in GROUPS if group in want):
        a, b = got[group], want[group]
        norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        found[group] = float(np.linalg.norm(a - b)) / max(norm_b, 1e-30)
        found[f"{group} norm"] = abs(norm_a / max(norm_b, 1e-30) - 1)
        found[f"{group} direction"] = 1 - float(a @ b) / max(norm_a * norm_b, 1e-30)
    return {name: value if math.isfinite(value) else math.inf for name, value in found.items()}


def parting(passed: list[Variant], failed: list[Variant]) -> list[str]:
    """The fewest dimensions whose values tell the failed from the passed: ["sp, sequence_parallel: 8 ring"]."""
    dims = [[variant.dims() for variant in group] for group in (failed, passed)]
    for count in (1, 2, 3):
        lines = []
        for names in combinations(dims[1][0], count):
            bad, good = ({tuple(variant[name] for name in names) for variant in group} for group in dims)
            if bad and not bad & good:
                shown = sorted(" ".join(str(value) or "none" for value in values) for values in bad)
                lines.append(f"{', '.join(names)}: {'; '.join(shown)}")
        if lines:
            return lines
    return []


def verify(config: Config, device_count: int, tolerance: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every variant and compares; the report as a JSON-serialisable dict with "ok" and "parting"."""
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.objectives import objective_of
    from ringbpt.training.loop import loader_of

    loader = loader_of(config, make_tokenizer(config.tokenizer))
    host = first_batch(loader)
    plain = plainest(config)
    if objective_of(config).reference:
        host = with_reference(plain.apply(config), host, config.seed + 1)
    todo = variants(config, device_count)
    say(f"{len(todo)} variants against the plainest; tolerance {tolerance:g}; {loader.describe()}")
    want = step_numbers(plain.apply(config), host, config.seed)
    rows, compared, started = [], [], time.perf_counter()
    for i, variant in enumerate(todo):
        divisor = variant.mesh.row_shards * variant.accumulate_gradient_steps
        batch = host if variant.packing == "as given" else repacked(host, variant.packing, divisor)
        batch = filled_up(batch, divisor)
        try:
            numbers = step_numbers(variant.apply(config), batch, config.seed)
        except UserError as refusal:  # a kernel that cannot do this; where it was asked for, that is the answer
            if variant.execution.attention_kernel == config.execution.attention_kernel:
                raise
            say(f"skip {refusal}")
            continue
        compared.append(variant)
        found = differences(numbers, want)
        worst = max(value for name, value in found.items() if "direction" not in name)
        rows.append({"variant": variant.dims(), "differences": found, "worst": worst, "ok": worst <= tolerance})
        left = (time.perf_counter() - started) / (i + 1) * (len(todo) - i - 1)
        say(f"{'ok  ' if rows[-1]['ok'] else 'FAIL'} {_line(variant, plain, found)}  ({left:.0f} s left)")
    failed = [variant for variant, row in zip(compared, rows, strict=True) if not row["ok"]]
    passed = [plain, *(variant for variant, row in zip(compared, rows, strict=True) if row["ok"])]
    report = {"tolerance": tolerance, "loss": want["loss"], "rows": rows, "ok": not failed}
    return report | {"parting": parting(passed, failed)}


def _line(variant: Variant, plain: Variant, found: dict[str, float]) -> str:
    known = plain.dims()
    what = " ".join(f"{name}={value}" for name, value in variant.dims().items() if value != known[name])
    groups = "  ".join(f"{name} {found[name]:.1e}" for name in ("loss", "metrics", *GROUPS) if name in found)
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
    with json_to(own["json"]) as write:
        report = verify(config, device_count, tolerance)
        bad = sum(not row["ok"] for row in report["rows"])
        for line in report["parting"]:
            print(f"the numbers part along {line}")
        print(f"{len(report['rows']) - bad} of {len(report['rows'])} variants agree with the plainest to {tolerance:g}")
        write(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
