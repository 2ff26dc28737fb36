"""What a run says about itself: metrics.jsonl, TensorBoard, Weights & Biases, the terminal, and loss.png."""

import dataclasses
import datetime
import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import jax

from ringbpt import hardware
from ringbpt.config import Config, UserError, printable, to_dict
from ringbpt.config import say as print_line
from ringbpt.evaluation.pictures import plain_log, set_title, thousands
from ringbpt.model.flops import training_flops
from ringbpt.objectives import Objective
from ringbpt.training.guards import Verdict
from ringbpt.training.step import Metrics
from ringbpt.types import Mean, Means

MetricsRow = dict[str, float | int]
T = TypeVar("T")

# How the terminal shows a row, in this order: key, label before, format, unit after.
SHOWN = (
    ("reward", "reward ", "6.3f", ""),
    ("length", "length ", "6.1f", ""),
    ("loss", "loss ", "7.4f", ""),
    ("bits_per_byte", "", "6.3f", " bits/byte"),
    ("accuracy", "accuracy ", "5.3f", ""),
    ("rewards/accuracies", "accuracy ", "5.3f", ""),
    ("rewards/margins", "margin ", "6.3f", ""),
    ("kl", "kl ", "6.3f", ""),
    ("learning_rate", "lr ", "8.2e", ""),
    ("gradient_norm", "grad ", "8.3f", ""),
    ("tokens_per_second", "", "10,.0f", " tokens/s"),
    ("step_seconds", "", "7.3f", " s/step"),
    ("mfu", "mfu ", "5.3f", ""),
)
# What a run's time goes to. steps: what devices were asked to do, and all that goes on meanwhile; data: waiting for a
# batch when no step is under way any more; save: until the arrays have left the devices, and at the end until they are
# on the disk; compile: of the step; eval: with its compile; other: all before the first step, and the end.
GOODPUT = ("steps", "data", "save", "compile", "eval", "other")
SHOWN_IN_BAR = ("loss", "bits_per_byte", "tokens_per_second")  # fits 80 columns beside the bar


class MetricsWriter:
    """Writes a run's metrics into `run_dir`, which must exist by the first row.

    Only the main process writes (`is_main`); with log_all_worker the others write too, to files and curves of their
    own (metrics.worker3.jsonl, tensorboard/worker3), and only the main one speaks on the terminal and draws.
    """

    def __init__(self, run_dir: Path, config: Config, is_main: bool):
        self._config = config
        self._is_main = is_main
        self._writes = is_main or config.log_all_worker
        worker = "" if is_main else f"worker{jax.process_index()}"
        self.path = run_dir / ".".join(filter(None, ("metrics", worker, "jsonl")))
        self._run_dir = run_dir
        self._tensorboard_dir = run_dir / "tensorboard" / worker
        self._tensorboard: TensorBoard | None = None
        self._purge_step: int | None = None
        self._wandb = _start_wandb(run_dir, config, worker) if self._writes and config.logger.online else None
        self._late: list[str] = []  # rows that found no room
        self._bar: Any = None
        self._bar_task: Any = None

    def resume_from(self, step: int) -> None:
        """Before the first write of a resumed run: drop the rows after `step`, which the run is about to repeat.

        A last line that was cut off by a kill goes too. `resume_from(0)` begins an existing folder anew.
        """
        self._purge_step = step + 1
        if not self._writes or not self.path.exists():
            return
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.replace(self.path)

    def write(self, row: MetricsRow) -> None:
        """Append one row, `{"step": 100, "loss": ...}`; on the disk when this returns, in TensorBoard's file too.

        Evaluation rows are the same but for their keys, `eval_loss` and so on. NaN and infinities, which JSON
        doesn't have, become null.
        """
        if not self._writes:
            return
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        valid = {key: value if math.isfinite(value) else None for key, value in plain.items()}
        step = int(plain["step"])
        finite = {key: value for key, value in valid.items() if key != "step" and value is not None}
        self._late.append(json.dumps(valid, allow_nan=False) + "\n")
        try:
            self._append_late()
            if self._tensorboard is None:
                self._tensorboard = TensorBoard(self._tensorboard_dir, self._purge_step)
            self._tensorboard.write(step, finite)
        except OSError as error:  # of a full disk: training is worth more, and there may be room again
            self._say(f"{self.path}: {error.strerror}: rows are written later")
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def _append_late(self) -> None:
        """Appends the rows that aren't in the file yet; of one that has room for a part alone nothing stays."""
        if not self._late:
            return
        with open(self.path, "ab", buffering=0) as file:
            end, left = file.tell(), "".join(self._late).encode()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._late = []

    def progress(self, step: int, row: MetricsRow) -> None:
        """Show a row: on a terminal a bar that moves, elsewhere a plain line. Steps count up to total_steps."""
        if not self._is_main:
            return
        if any(key.startswith("eval_") for key in row):
            self._say(f"{self._step_label(step)}  {format_row(row)}  (held-out)")
            return
        seconds = (self._config.total_steps - step) * row.get("step_seconds", math.nan)
        # From the last steps' time, not from the start of the run: that would count the compile.
        eta = f"ETA {datetime.timedelta(seconds=round(seconds))}" if math.isfinite(seconds) else "ETA ?"
        if not sys.stdout.isatty():
            self._say(f"{self._step_label(step)}  {format_row(row)}  {eta}")
            return
        if self._bar is None:
            self._open_bar()
        self._bar.update(self._bar_task, completed=step, line=f"{format_row(row, SHOWN_IN_BAR)}  {eta}")

    def close(self) -> None:
        """Flush everything, and draw loss.png from metrics.jsonl: of a resumed run, the whole curve."""
        if self._bar is not None:
            self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        try:
            self._append_late()
            if self._is_main and self.path.exists():
                draw(read_rows(self.path), self._run_dir / "loss.png", self._run_dir.name)
        except OSError as error:
            print_line(f"{self._run_dir}: {error.strerror}: {len(self._late)} rows and loss.png are lost")

    def _step_label(self, step: int) -> str:
        total = str(self._config.total_steps)
        return f"step {step:>{len(total)}}/{total}"

    def _say(self, line: str) -> None:
        if self._bar is None:
            print_line(line)
        else:
            self._bar.console.print(line, highlight=False)  # above the bar

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[line]}")
        )
        self._bar_task = self._bar.add_task("", total=self._config.total_steps, line="")
        self._bar.start()


class TensorBoard:
    """A file of TensorBoard's events in `folder`; a row is handed to the system when it is written, as one record.

    The library's own SummaryWriter has a queue, a thread and a buffer: a run that is killed loses two minutes of rows.
    purge_step: from here on TensorBoard leaves out what older files hold.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, and no two of a run, however short, may have one name.
        self._file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb", buffering=0)  # noqa: SIM115
        self._append(file_version="brain.Event:2")
        if purge_step is not None:
            self._append(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._append(step=step, summary=self._summary(value=scalars))

    def _append(self, **event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **event).SerializeToString()
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
        self._file.write(size + checks[0] + data + checks[1])

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass
class Clock:
    """Turns the metrics of the steps since the last row into a row, and the steps into speeds, compile excluded.

    The objective's means are those of all these steps, each weighed by what it was taken over, so that the loss is the
    mean of the tokens; `loss_step` is the last step's own, and so is all that is no mean (the learning rate, norms).
    take_waited: seconds that the loop stood still for data since it was last asked; their share is `data_wait`. means:
    the sums since the last row, for a checkpoint between two rows. look: is told what each step's guard found. began:
    when the run did, by time.perf_counter: each moment since then belongs to one of GOODPUT, see `spending`.
    """

    config: Config
    objective: Objective
    bytes_per_token: float
    take_waited: Callable[[], float] = lambda: 0.0
    means: Means = dataclasses.field(default_factory=dict)
    look: Callable[[int, Verdict], None] = lambda step, verdict: None
    began: float = dataclasses.field(default_factory=time.perf_counter)
    _since: float | None = None
    _steps: int = 0
    _counts: dict[str, float] = dataclasses.field(default_factory=lambda: {"tokens": 0.0, "pairs": 0.0})

    def __post_init__(self) -> None:
        self._spent, self._now_for, self._now_since = dict.fromkeys(GOODPUT, 0.0), "other", self.began
        self._waited = 0.0  # since the last row

    def _turn_to(self, what: str) -> str:
        """What is done from now on; returns what was done until now."""
        before, now = self._now_for, time.perf_counter()
        self._spent[before] += now - self._now_since
        self._now_for, self._now_since = what, now
        return before

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """The time in here is spent on `what`, one of GOODPUT, but for what other uses inside of it take."""
        before = self._turn_to(what)
        try:
            yield
        finally:
            self._turn_to(before)

    def spend(self, what: str, function: Callable[..., T], *args: Any) -> T:
        with self.spending(what):
            return function(*args)

    @contextmanager
    def closing(self, what: str, thing: Any) -> Iterator[None]:
        """contextlib.closing, whose time at the end is spent on `what`."""
        try:
            yield
        finally:
            self.spend(what, thing.close)

    def _hear_of_waiting(self) -> None:
        """Of the time of steps, what was none: the loop stood still for data, and no step was under way."""
        seconds = self.take_waited()
        self._waited += seconds
        self._spent["data"] += seconds
        self._spent["steps"] -= seconds

    def goodput(self) -> dict[str, float]:
        """{"goodput/steps": share of the time since the run began, ...} of GOODPUT; their sum is 1."""
        self._turn_to(self._now_for)
        self._hear_of_waiting()
        whole = sum(self._spent.values())
        return {f"goodput/{name}": seconds / whole for name, seconds in self._spent.items()}

    def close(self) -> None:
        """Says where the run's time went, if it came to a step."""
        if self._since is not None:
            shares = self.goodput()
            told = ", ".join(f"{name} {shares[f'goodput/{name}']:.1%}" for name in GOODPUT)
            say(f"goodput {told} of {datetime.timedelta(seconds=round(sum(self._spent.values())))}")

    def restart(self) -> None:
        """Forget the steps so far; the next one begins now."""
        self._hear_of_waiting()
        self._waited = 0.0
        self._since, self._steps, self._counts = time.perf_counter(), 0, dict.fromkeys(self._counts, 0.0)

    def tick(self, step: int, metrics: Metrics) -> dict[str, float] | None:
        """Waits for a step's metrics; the row to log if this step is one of log_freq (or the last), else None."""
        found = jax.device_get(metrics)
        own = {name: float(value) for name, value in found.own.items()}
        if not math.isfinite(norm := own.get("param_norm", 0.0)):
            raise UserError(f"step {step}: the weights are numbers no more: their norm is {norm}", code=3)
        if found.guard is not None:
            self.look(step, found.guard)
            own |= {"skipped": int(found.guard.skipped)} if found.guard.skipped else {}
        last = {name: Mean(float(mean.total), float(mean.weight)) for name, mean in found.means.items()}
        self.means = {name: self.means.get(name, Mean(0.0, 0.0)) + mean for name, mean in last.items()}
        compiled_just_now = self._since is None
        if not compiled_just_now:
            self._steps += 1
            self._counts = {name: total + own[name] for name, total in self._counts.items()}
        tokens, pairs = own.pop("tokens"), own.pop("pairs")
        row = None
        if due(step, self.config.log_freq) or step == self.config.total_steps:
            values = self.objective.values(self.means, self.config)
            row = {"step": step, **values, **bits_per_byte(values, self.bytes_per_token)}
            step_values = self.objective.values(last, self.config)
            row |= ({"loss_step": step_values["loss"]} if "loss" in step_values else {}) | own
            if self._since is not None and self._steps:
                row |= self._speeds(time.perf_counter() - self._since)
            row |= {"tokens": tokens, "visible_pairs": pairs} | self.goodput() | _device_memory()
            self.means = {}
        if compiled_just_now or row:
            self.restart()
        return row

    def _speeds(self, seconds: float) -> dict[str, float]:
        speeds = {"step_seconds": seconds / self._steps, "tokens_per_second": self._counts["tokens"] / seconds}
        self._hear_of_waiting()
        speeds["data_wait"] = self._waited / seconds
        device = hardware.find(jax.devices()[0].device_kind)
        if device is not None:
            flops = training_flops(self.config, self._counts["tokens"], self._counts["pairs"])
            speeds["mfu"] = flops / seconds / (device.bf16_tflops * 1e12 * jax.device_count())
        return speeds


def due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def bits_per_byte(values: dict[str, float], bytes_per_token: float) -> dict[str, float]:
    """{"bits_per_byte": ...} of a loss in nats a token; {} where there is no loss, or no text behind it."""
    if "loss" not in values or math.isinf(bytes_per_token):
        return {}
    return {"bits_per_byte": values["loss"] / math.log(2) / bytes_per_token}


def _device_memory() -> dict[str, float]:
    """Peak bytes on the first device, where the backend reports them (CPUs don't)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"device_memory_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def say(text: str) -> None:
    """Print, on the main process alone, what may hold names that others have given."""
    if jax.process_index() == 0:
        print_line(printable(text))


def format_row(row: MetricsRow, keys: Iterable[str] | None = None) -> str:
    """The shown values of a row, with or without `eval_` (of `keys` alone, if given), in columns of fixed width."""
    parts = []
    for key, label, number, unit in SHOWN:
        value = row.get(key, row.get(f"eval_{key}")) if keys is None or key in keys else None
        if value is not None:
            parts.append(f"{label}{value:{number}}{unit}")
    return "  ".join(parts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line that isn't a whole row (the run was killed in it) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss against the step, training and held-out in the same axes, and on the right what it is in bits per byte, or
    of which share of the pairs the chosen answer has the greater reward.

    A training row is the mean of the steps since the one before; pale behind it are the steps' own.
    """
    # Not pyplot: that would choose a window system, and keep the figure for ever.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {key: _curve(rows, key) for key in ("loss", "eval_loss", "loss_step")}
    losses = [value for key in ("loss", "eval_loss") for value in curves[key][1]]
    if not losses:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    if curves["loss_step"][1] and curves["loss_step"] != curves["loss"]:
        axis.plot(*curves["loss_step"], color="C0", alpha=0.3, linewidth=0.8, label="single steps")
    for prefix, name, color in (("", "training", "C0"), ("eval_", "held-out", "C1")):
        steps, values = curves[f"{prefix}loss"]
        if values:
            bits = _curve(rows, f"{prefix}bits_per_byte")[1][-1:]
            last = ", ".join([f"{values[-1]:.3f}", *(f"{each:.3f} bits per byte" for each in bits)])
            marker = "o" if prefix or len(values) == 1 else ""
            label = f"{name} (last: {last})"
            axis.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.2, label=label)
    steep, rates, shown = 0 < 2 * min(losses) < max(losses), _bits_a_nat(rows, ""), [axis]
    if steep:  # else the first steps would leave no room for the others
        axis.set_ylim(0.97 * min(losses), 1.03 * max(losses))
    if rates:
        shown.append(axis.twinx())
        shown[1].set_ylim(*(limit * rates[0] for limit in axis.get_ylim()))
        others = any(abs(rate / rates[0] - 1) > 0.005 for rate in _bits_a_nat(rows, "eval_"))
        shown[1].set_ylabel("bits per byte of the training data" if others else "bits per byte")
    elif accuracies := {prefix: _curve(rows, f"{prefix}rewards/accuracies") for prefix in ("", "eval_")}:
        _draw_accuracies(axis, accuracies)
    if steep:
        for each in shown:
            each.set_yscale("log")
            plain_log(each.yaxis)
    set_title(axis, title)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a token)" if rates else "loss")
    thousands(axis.xaxis)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def _draw_accuracies(axis: Any, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """On the right of an axis, dashed; nothing where there are none."""
    if not any(values for _, values in curves.values()):
        return
    right = axis.twinx()
    for (_, (steps, values)), color in zip(curves.items(), ("C0", "C1"), strict=True):
        right.plot(steps, values, color=color, linestyle="--", linewidth=1)
    right.set_ylim(-0.02, 1.02)
    right.set_ylabel("accuracy of the rewards (dashed)")


def _bits_a_nat(rows: list[dict[str, Any]], prefix: str) -> list[float]:
    """What a nat a token is in bits per byte, by the rows that have both; one number, but for rounding."""
    pairs = [(row.get(f"{prefix}bits_per_byte"), row.get(f"{prefix}loss")) for row in rows]
    return [bits / loss for bits, loss in pairs if bits and loss]


def _curve(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps that have a number of this name, and the numbers."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def check_wandb() -> None:
    """Raises UserError where --logger.online cannot work: wandb isn't there, or has no key or no network, unless
    WANDB_MODE says that it needs neither. Asked first of all, so that no data are tokenised in vain.
    """
    wandb = _import_wandb()
    settings = wandb.setup().settings
    if settings.mode != "online":
        return
    instead = "WANDB_MODE=offline keeps the metrics for `wandb sync`, --logger.online=False leaves them out"
    try:
        with suppress(HTTPError):  # any answer will do
            urlopen(settings.base_url, timeout=10).close()
        wandb.login()
    except wandb.errors.UsageError:
        raise UserError(f"--logger.online=True: no API key is configured: `wandb login`; {instead}") from None
    except OSError as error:
        raise UserError(f"--logger.online=True: {settings.base_url} does not answer ({error}): {instead}") from None


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            '--logger.online=True: wandb is not installed; pip install "ringbpt[wandb]" or --logger.online=False'
        ) from None
    return wandb


def _start_wandb(run_dir: Path, config: Config, worker: str) -> Any:
    wandb = _import_wandb()
    run_dir.mkdir(parents=True, exist_ok=True)  # else wandb would keep its files elsewhere
    name = run_dir.name
    return wandb.init(
        project="--".join(filter(None, (config.logger.prefix, config.logger.project_id))),
        entity=config.logger.entity or None,
        name="-".join(filter(None, (name, worker))),
        group=name if config.log_all_worker else None,
        notes=config.logger.experiment_note or None,
        dir=str(run_dir),
        config=to_dict(config),
    )
