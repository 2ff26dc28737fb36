"""What a training run looks at besides the loss of its objective, every --eval_steps."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from ringbpt.config import Config
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.evaluation.passkey import draw_grid, passkey_grid
from ringbpt.evaluation.perplexity import draw_curve, make_loss_by_position
from ringbpt.evaluation.score import Scorer
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params

Probe = Callable[[Params, Iterable[Batch]], dict[str, float]]
DEPTHS, SAMPLES = (0.0, 0.25, 0.5, 0.75, 1.0), 4


def make_probe(config: Config, model: Model, tokenizer: Tokenizer, folder: Path) -> Probe | None:
    """probe(params, eval batches) -> metrics; pictures go to `folder`. None where nothing is asked for.

    --eval_by_position: perplexity.png. --eval_passkey=LENGTHS: passkey.png, and the share found at each length.
    """
    lengths = [int(part) for part in config.eval_passkey.split(",")] if config.eval_passkey else []
    if not lengths and not config.eval_by_position:
        return None
    measure = make_loss_by_position(model, config.eval_dataset.seq_length) if config.eval_by_position else None
    scorer = Scorer(model)

    def probe(params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        found, draws = {}, jax.process_index() == 0
        if measure:
            curve = measure(params, batches)
            if draws and curve.tokens.any():
                draw_curve(folder / "perplexity.png", curve, f"{folder.name}\nheld-out data")
        if lengths:
            grid = passkey_grid(scorer, params, tokenizer.encode_prompt, lengths, DEPTHS, SAMPLES)
            found = {f"eval_passkey_{n}": float(row.mean()) for n, row in zip(lengths, grid, strict=True)}
            if draws:
                draw_grid(folder / "passkey.png", grid, lengths, DEPTHS, f"{folder.name}\n{SAMPLES} keys a cell")
        return found

    return probe
