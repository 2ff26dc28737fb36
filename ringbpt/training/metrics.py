"""What a run says about itself: metrics.jsonl, TensorBoard, Weights & Biases, the terminal, and loss.png."""

import dataclasses
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from ringbpt import hardware
from ringbpt.config import Config, UserError, to_dict
from ringbpt.model.flops import forward_flops

MetricsRow = dict[str, float | int]

# How the terminal shows a row, in this order: key, label before, format, unit after.
SHOWN = (
    ("loss", "loss ", "7.4f", ""),
    ("bits_per_byte", "", "6.3f", " bits/byte"),
    ("accuracy", "accuracy ", "5.3f", ""),
    ("learning_rate", "lr ", "8.2e", ""),
    ("gradient_norm", "grad ", "8.3f", ""),
    ("tokens_per_second", "", "10,.0f", " tokens/s"),
    ("step_seconds", "", "7.3f", " s/step"),
    ("mfu", "mfu ", "5.3f", ""),
)
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
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._wandb = _start_wandb(run_dir, config, worker) if self._writes and config.logger.online else None
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
        """Append one row, `{"step": 100, "loss": ...}`; on the disk when this returns.

        Evaluation rows are the same but for their keys, `eval_loss` and so on. NaN and infinities, which JSON
        doesn't have, become null.
        """
        if not self._writes:
            return
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        valid = {key: value if math.isfinite(value) else None for key, value in plain.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(valid, allow_nan=False) + "\n")
        step = int(plain["step"])
        finite = {key: value for key, value in valid.items() if key != "step" and value is not None}
        if self._tensorboard is None:
            self._tensorboard = self._open_tensorboard()
        for key, value in finite.items():
            self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

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
        if self._is_main and self.path.exists():
            draw(read_rows(self.path), self._run_dir / "loss.png")

    def _step_label(self, step: int) -> str:
        total = str(self._config.total_steps)
        return f"step {step:>{len(total)}}/{total}"

    def _say(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, highlight=False)  # above the bar

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[line]}")
        )
        self._bar_task = self._bar.add_task("", total=self._config.total_steps, line="")
        self._bar.start()

    def _open_tensorboard(self) -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._tensorboard_dir), purge_step=self._purge_step)


@dataclasses.dataclass
class Clock:
    """Turns a step's metrics into a row, and steps into speeds: over the steps since the last row, compile excluded.

    take_waited: seconds that the loop stood still for data since it was last asked; their share is `data_wait`.
    """

    config: Config
    bytes_per_token: float
    take_waited: Callable[[], float] = lambda: 0.0
    _since: float | None = None
    _steps: int = 0
    _counts: dict[str, float] = dataclasses.field(default_factory=lambda: {"tokens": 0.0, "pairs": 0.0})

    def restart(self) -> None:
        """Forget the steps so far; the next one begins now."""
        self.take_waited()
        self._since, self._steps, self._counts = time.perf_counter(), 0, dict.fromkeys(self._counts, 0.0)

    def tick(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float] | None:
        """Waits for a step's metrics; the row to log if this step is one of log_freq (or the last), else None."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        compiled_just_now = self._since is None
        if not compiled_just_now:
            self._steps += 1
            self._counts = {name: total + values[name] for name, total in self._counts.items()}
        tokens, pairs = values.pop("tokens"), values.pop("pairs")
        row = None
        if due(step, self.config.log_freq) or step == self.config.total_steps:
            row = {"step": step, **values, "bits_per_byte": bits_per_byte(values["loss"], self.bytes_per_token)}
            if self._since is not None and self._steps:
                row |= self._speeds(time.perf_counter() - self._since)
            row |= {"tokens": tokens, "visible_pairs": pairs} | _device_memory()
        if compiled_just_now or row:
            self.restart()
        return row

    def _speeds(self, seconds: float) -> dict[str, float]:
        speeds = {"step_seconds": seconds / self._steps, "tokens_per_second": self._counts["tokens"] / seconds}
        speeds["data_wait"] = self.take_waited() / seconds
        device = hardware.find(jax.devices()[0].device_kind)
        if device is not None:
            flops = 3 * forward_flops(self.config.architecture, self._counts["tokens"], self._counts["pairs"])
            speeds["mfu"] = flops / seconds / (device.bf16_tflops * 1e12 * jax.device_count())
        return speeds


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token


def _device_memory() -> dict[str, float]:
    """Peak bytes on the first device, where the backend reports them (CPUs don't)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"device_memory_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def say(text: str) -> None:
    """Print, on the main process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


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


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, and below it bits per byte, against the step: training and held-out in the same axes."""
    # Not pyplot: that would choose a window system, and keep the figure for ever.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (key, title)
        for key, title in (("loss", "loss (nats per token)"), ("bits_per_byte", "bits per byte"))
        if any(row.get(prefix + key) is not None for row in rows for prefix in ("", "eval_"))
    ]
    if not panels:
        return
    figure = Figure(figsize=(8, 4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, title) in zip(axes, panels, strict=True):
        for prefix, label, style in (("", "training", "-"), ("eval_", "held-out", "o-")):
            points = [(row["step"], row[prefix + key]) for row in rows if row.get(prefix + key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, style, label=f"{label} (last: {values[-1]:.3f})", linewidth=1.2, markersize=4)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)


def _start_wandb(run_dir: Path, config: Config, worker: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            '--logger.online=True: wandb is not installed; pip install "ringbpt[wandb]" or --logger.online=False'
        ) from None
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
