"""Writes rewards.json: what TRL's reward trainer and transformers' sequence classification make of the pairs of
make_preferences.py, for a tiny LLaMA with a score head, in float32.

    pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0 && python -m tests.golden.make_rewards

For each case the losses before and after each of five steps of AdamW and the gradient's norm before the first, as in
make_preferences.py; the log-exp form is its formula, in float64, log(1 + exp(rejected - chosen)). scores: of each of
the pairs' texts, alone, padded on the right, and on the left.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.make_llama import CASES, SIZES, weights
from tests.golden.make_preferences import CASE, descend, pairs, settings, tokenizer

FILE = Path(__file__).with_name("rewards.json")
CENTER = 0.01
MARGINS = (0.0, 0.5, 1.5, 0.25)
TRL: dict[str, dict[str, Any]] = {
    "reward": {},
    "reward_margin": {},
    "reward_center": {"center_rewards_coefficient": CENTER},
}


def score_weights() -> dict[str, np.ndarray]:
    """Those of the language model, and a score in place of its head."""
    score = np.random.RandomState(7).randn(1, SIZES["hidden_size"]).astype(np.float32) * 0.3
    return {name: w for name, w in weights(CASE).items() if name != "lm_head.weight"} | {"score.weight": score}


def model_of() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    more = {"tie_word_embeddings": False, "max_position_embeddings": 96, "use_cache": False, "num_labels": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**more, **SIZES, **CASES[CASE], pad_token_id=0))
    model.load_state_dict({name: torch.tensor(value) for name, value in score_weights().items()})
    return model


def texts() -> list[list[int]]:
    return [pair["prompt_ids"] + pair[f"{which}_ids"] for which in ("chosen", "rejected") for pair in pairs()]


def by_trl(name: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=model_of(),
        args=RewardConfig(**settings(max_length=None, disable_dropout=True, **TRL[name])),
        train_dataset=Dataset.from_list([{"prompt": "w4", "chosen": "w5", "rejected": "w6"}] * 2),
        processing_class=tokenizer(),
    )
    margins = [{"margin": margin} if name == "reward_margin" else {} for margin in MARGINS]
    rows = [
        {f"{which}_ids": pair["prompt_ids"] + pair[f"{which}_ids"] for which in ("chosen", "rejected")} | margin
        for pair, margin in zip(pairs(), margins, strict=True)
    ]
    batch = trainer.data_collator(rows)
    trainer.model.train()
    found = descend(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch)))
    metrics = {key: trainer._metrics["train"][key][0] for key in ("accuracy", "margin")}
    return found | {"metrics": metrics}


def by_formula() -> dict[str, Any]:
    import torch

    model = model_of().double()

    def loss() -> Any:
        scores = torch.stack([model(torch.tensor([text])).logits[0, 0] for text in texts()])
        chosen, rejected = scores.chunk(2)
        return torch.log(1 + torch.exp(rejected - chosen)).mean()

    return descend(model, loss) | {"metrics": {}}


def scores() -> dict[str, list[float]]:
    import torch

    model, rows = model_of().eval(), texts()
    width = max(map(len, rows)) + 3

    def of(padded: list[list[int]], mask: list[list[int]]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits[:, 0].tolist()

    rest = [width - len(row) for row in rows]
    return {
        "alone": [of([row], [[1] * len(row)])[0] for row in rows],
        "right": of(
            [row + [0] * n for row, n in zip(rows, rest, strict=True)],
            [[1] * len(row) + [0] * n for row, n in zip(rows, rest, strict=True)],
        ),
        "left": of(
            [[0] * n + row for row, n in zip(rows, rest, strict=True)],
            [[0] * n + [1] * len(row) for row, n in zip(rows, rest, strict=True)],
        ),
    }


def golden(name: str) -> dict[str, Any]:
    return by_formula() if name == "reward_logexp" else by_trl(name)


NAMES = (*TRL, "reward_logexp")

if __name__ == "__main__":
    found = {name: golden(name) for name in NAMES}
    FILE.write_text(json.dumps(found | {"scores": scores()}, indent=1) + "\n")
    print(f"{FILE}: {len(found)} cases")
