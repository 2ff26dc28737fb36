"""Writes preferences.json: what TRL makes of preferences, by its own trainers' losses, for a tiny LLaMA in float32.

    pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0 && python -m tests.golden.make_preferences

For each objective: the losses before and after each of five steps of AdamW (rate 1e-3, b2 0.999, no decay, nothing
clipped), the gradient's norm, and what TRL logs, before the first. The reference is another model than the policy.
Tokens are handed over as ids, so that no tokenizer has a say. What TRL does not have is its published formula, in
float64, of the log-probabilities that transformers gives.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.make_llama import CASES, SIZES, weights

FILE = Path(__file__).with_name("preferences.json")
CASE = "mha"
BETA, SMOOTHING, GAMMA, RATE, STEPS = 0.1, 0.1, 0.5, 1e-3, 5
# Our names -> what TRL's DPO trainer is told.
DPO = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "cdpo": {"loss_type": "aot", "label_smoothing": SMOOTHING},  # of one pair a batch
    "robust": {"loss_type": "robust", "label_smoothing": SMOOTHING},
    "hinge": {"loss_type": "hinge"},
    "exo": {"loss_type": "exo_pair", "label_smoothing": SMOOTHING},
    "nca": {"loss_type": "nca_pair"},
    "bco": {"loss_type": "bco_pair"},
    "sppo": {"loss_type": "sppo_hard"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "dpo_nll": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}


# What a trainer is made with; it is given ids afterwards.
TEXT = [{"prompt": "w4", "chosen": "w5", "rejected": "w6"}] * 2


def pairs() -> list[dict[str, list[int]]]:
    """Prompts and answers of unequal lengths, as token ids."""
    rng = np.random.RandomState(2)
    draw = lambda length: rng.randint(1, SIZES["vocab_size"], length).tolist()
    lengths = ((5, 7, 4), (9, 3, 8), (2, 6, 6), (7, 1, 9))
    return [{"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in lengths]


def answers() -> list[dict[str, Any]]:
    """The same, each answer by itself; KL_completion_ids is that of the answer before it, the first one's the last."""
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[which], "label": which == "chosen_ids"}
        for pair in pairs()
        for which in ("chosen_ids", "rejected_ids")
    ]
    return [row | {"KL_completion_ids": rows[number - 1]["completion_ids"]} for number, row in enumerate(rows)]


def reference_weights() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(5)
    return {name: (w * (1 + 0.3 * rng.randn(*w.shape))).astype(np.float32) for name, w in weights(CASE).items()}


def model_of(state: dict[str, np.ndarray]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"tie_word_embeddings": False, "max_position_embeddings": 96, "use_cache": False, **SIZES, **CASES[CASE]}
    model = LlamaForCausalLM(LlamaConfig(**settings, pad_token_id=0))
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return model


def tokenizer() -> Any:
    """Trainers want one; it is asked for its padding alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", bos_token="w3")


def descend(model: Any, loss_of: Any) -> dict[str, Any]:
    """The losses, and of the first of them the gradient's norm. loss_of() computes it anew."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norm = [], 0.0
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of()
        losses.append(loss.item())
        loss.backward()
        if step == 0:
            norm = float(
                torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters() if p.grad is not None))
            )
        optimizer.step()
    return {"losses": losses, "gradient_norm": norm}


def settings(**more: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        **more,
    }


def logged(metrics: dict[str, list[float]]) -> dict[str, float]:
    wanted = ("rewards/", "logps/", "kl")
    return {name: float(values[0]) for name, values in metrics.items() if name.startswith(wanted) and values}


def by_dpo(options: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = model_of(weights(CASE))
    trainer = DPOTrainer(
        model=model,
        ref_model=model_of(reference_weights()),
        args=DPOConfig(**settings(beta=BETA, max_length=None, disable_dropout=True, **options)),
        train_dataset=Dataset.from_list(TEXT),
        processing_class=tokenizer(),
    )
    # aot sorts the pairs of a batch: alone, each is what it is.
    groups = [[pair] for pair in pairs()] if options["loss_type"] == "aot" else [pairs()]
    batches = [trainer.data_collator(group) for group in groups]
    trainer.model.train()

    def loss() -> Any:
        return sum(trainer.compute_loss(trainer.model, dict(batch)) for batch in batches) / len(batches)

    found = descend(trainer.model, loss)
    metrics = logged(trainer._metrics["train"]) if len(batches) == 1 else {}
    return found | {"metrics": metrics}


def by_kto(loss_type: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = answers()
    if loss_type != "kto":
        rows = [{name: value for name, value in row.items() if name != "KL_completion_ids"} for row in rows]
    trainer = KTOTrainer(
        model=model_of(reference_weights()),  # the other way round, so that the KL is above its clamp
        ref_model=model_of(weights(CASE)),
        args=KTOConfig(
            **settings(
                beta=BETA, loss_type=loss_type, desirable_weight=1.5, max_length=None, disable_dropout=True,
                train_sampling_strategy="sequential",
            )
        ),
        train_dataset=Dataset.from_list([{"prompt": "w4", "completion": "w5", "label": True}] * 2),
        processing_class=tokenizer(),
    )  # fmt: skip
    batch = trainer.data_collator(rows)
    trainer.model.train()
    found = descend(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch)))
    return found | {"metrics": logged(trainer._metrics["train"])}


def by_old_trainer(name: str) -> dict[str, Any]:
    """SimPO and ORPO, of TRL's experimental trainers, by their own loss of a batch of ids."""
    import torch
    from datasets import Dataset

    if name == "simpo":
        from trl.experimental.cpo import CPOConfig as Settings
        from trl.experimental.cpo import CPOTrainer as Trainer

        more = {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}
    else:
        from trl.experimental.orpo import ORPOConfig as Settings
        from trl.experimental.orpo import ORPOTrainer as Trainer

        more = {}
    trainer = Trainer(
        model=model_of(weights(CASE)),
        args=Settings(**settings(beta=BETA, max_length=64, remove_unused_columns=False, **more)),
        train_dataset=Dataset.from_list(TEXT),
        processing_class=tokenizer(),
    )
    batch: dict[str, Any] = {}
    for which in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"], pair[f"{which}_ids"]) for pair in pairs()]
        width = max(len(p) + len(a) for p, a in rows)
        columns = (
            ("input_ids", 0, lambda p, a: p + a),
            ("attention_mask", 0, lambda p, a: [1] * len(p + a)),
            ("labels", -100, lambda p, a: [-100] * len(p) + a),
        )
        for column, padding, of in columns:
            filled = [of(p, a) + [padding] * (width - len(p + a)) for p, a in rows]
            batch[f"{which}_{column}"] = torch.tensor(filled)
    trainer.model.train()
    shown: dict[str, float] = {}

    def loss() -> Any:
        total, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
        if not shown:
            shown.update({key: float(value) for key, value in metrics.items() if key.startswith(("rewards/", "nll"))})
        return total

    return descend(trainer.model, loss) | {"metrics": shown}


def by_sft() -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "completion_mask": [0] * len(pair["prompt_ids"]) + [1] * len(pair["chosen_ids"]),
        }
        for pair in pairs()
    ]
    trainer = SFTTrainer(
        model=model_of(weights(CASE)),
        args=SFTConfig(**settings(completion_only_loss=True, max_length=None, packing=False)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))  # with labels, made of the mask
    trainer.model.train()
    return descend(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch))) | {"metrics": {}}


def by_formula() -> dict[str, Any]:
    """ipo of sums, in float64: TRL divides by the lengths. Ref: arXiv:2310.12036, eq. 17."""
    import torch

    model, reference = (model_of(w).double() for w in (weights(CASE), reference_weights()))

    def ratio(prompt: list[int], answer: list[int]) -> Any:
        token = torch.tensor([prompt + answer])
        logps = []
        for each in (model, reference):
            with torch.set_grad_enabled(each is model):
                logp = torch.log_softmax(each(token).logits[0, :-1], -1)
                logps.append(logp.gather(1, token[0, 1:, None])[len(prompt) - 1 :].sum())
        return logps[0] - logps[1]

    def loss() -> Any:
        deltas = [ratio(p["prompt_ids"], p["chosen_ids"]) - ratio(p["prompt_ids"], p["rejected_ids"]) for p in pairs()]
        return sum((delta - 1 / (2 * BETA)) ** 2 for delta in deltas) / len(deltas)

    return descend(model, loss) | {"metrics": {}}


def golden(name: str) -> dict[str, Any]:
    if name in DPO:
        return by_dpo(DPO[name])
    if name in ("kto", "apo_zero_unpaired"):
        return by_kto(name)
    return {"sft": by_sft, "ipo_sum": by_formula}[name]() if name in ("sft", "ipo_sum") else by_old_trainer(name)


NAMES = (*DPO, "kto", "apo_zero_unpaired", "simpo", "orpo", "sft", "ipo_sum")


if __name__ == "__main__":
    found = {name: golden(name) for name in NAMES}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FILE}: {len(found)} objectives")
