"""Writes policies.json: what TRL's GRPO and RLOO trainers make of fixed rollouts, for a tiny LLaMA in float32.

    pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0 && python -m tests.golden.make_policies

The trainers are test rigs: what was sampled, with the sampler's log-probabilities, and its rewards are handed to them,
and their own code does the rest. Scored with the old policy's weights, it has advantages, old and reference
log-probabilities and the ratio to the sampler; then come the loss and its gradient with the policy's. For each case:
the loss, the gradient's norm, the advantages, and what TRL logs. logp: of the old policy, the sampler and the
reference, an answer a list.

TRL's CISPO has a ceiling alone, at epsilon_high; ours, the paper's, is clipped to [1 - clip_low, 1 + clip_high]: they
are the same with clip_low 1 and epsilon_high = 1 + clip_high. (A floor above 0 is compared with nobody.)
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.make_llama import SIZES, weights
from tests.golden.make_preferences import CASE, model_of, reference_weights, settings, tokenizer

FILE = Path(__file__).with_name("policies.json")
PROMPTS, ANSWERS = (5, 2, 7), ((6, 3, 9, 1), (4, 8, 2, 5), (7, 1, 10, 3))  # lengths
# None: that reward has failed. The second group has no spread.
REWARDS = ((1.0, 0.25, None, -0.5), (0.5, 0.5, 0.5, 0.5), (0.0, 2.0, 0.75, 0.1))
LONGEST, BETA, ENTROPY, DUAL_CLIP, CISPO_HIGH = 12, 0.1, 0.05, 1.3, 0.25
KL = {"beta": BETA, "use_bias_correction_kl": False}  # GRPO's, arXiv:2402.03300; TRL's default is DeepSeek-V3.2's
# Our names of the cases -> what TRL's GRPOConfig is told.
GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + CISPO_HIGH},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
    },
    "dual_clip": {"loss_type": "grpo", "delta": DUAL_CLIP},
    "kl": {"loss_type": "grpo", **KL},
    "kl_dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", **KL},
    "entropy": {"loss_type": "grpo", "entropy_coef": ENTROPY},
    "token_truncate": {"loss_type": "grpo", "vllm_importance_sampling_mode": "token_truncate"},
    "token_mask": {"loss_type": "grpo", "vllm_importance_sampling_mode": "token_mask"},
    "answer_truncate": {"loss_type": "bnpo", "vllm_importance_sampling_mode": "sequence_truncate"},
    "answer_mask": {"loss_type": "bnpo", "vllm_importance_sampling_mode": "sequence_mask", **KL},
}  # fmt: skip


def rollouts() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts and their answers, of unequal lengths, as token ids."""
    rng = np.random.RandomState(11)
    draw = lambda length: rng.randint(4, SIZES["vocab_size"], length).tolist()
    return [(draw(p), [draw(length) for length in lengths]) for p, lengths in zip(PROMPTS, ANSWERS, strict=True)]


def near(state: dict[str, np.ndarray], noise: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(seed)
    return {name: (w * (1 + noise * rng.randn(*w.shape))).astype(np.float32) for name, w in state.items()}


def old_weights() -> dict[str, np.ndarray]:
    return near(weights(CASE), 0.03, 18)


def sampler_logps() -> list[list[float]]:
    """Of each answer's tokens, by weights so far from the old policy's that caps of 3 matter."""
    import torch

    model, found = model_of(near(old_weights(), 0.15, 13)).eval(), []
    for prompt, answers in rollouts():
        for answer in answers:
            token = torch.tensor([prompt + answer])
            with torch.no_grad():
                logp = torch.log_softmax(model(token).logits[0, :-1].double(), -1)
            found.append(logp.gather(1, token[0, 1:, None])[len(prompt) - 1 :, 0].tolist())
    return rounded(found)


def rounded(logps: list[list[float]]) -> list[list[float]]:
    return [[round(x, 7) for x in logp] for logp in logps]


def reward(prompts: list[str], worth: list[float | None], **_: Any) -> list[float | None]:
    return worth


def rig(name: str) -> Any:
    """A trainer for the case, with the old policy's weights, to which everything sampled is handed."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    prompts = [prompt for prompt, answers in rollouts() for _ in answers]
    answers = [answer for _, answered in rollouts() for answer in answered]
    more = {
        "num_generations": len(ANSWERS[0]),
        "num_iterations": 2,  # so that the old policy is asked
        "max_completion_length": LONGEST,
    } | {"per_device_train_batch_size": len(answers)}
    model, folder = model_of(old_weights()), tempfile.mkdtemp()
    model_of(reference_weights()).save_pretrained(folder)
    model.config._name_or_path = folder  # from where a trainer with a beta takes its reference
    given: dict[str, Any] = {
        "model": model,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list([{"prompt": "w4"}] * len(answers)),
        "processing_class": tokenizer(),
    }
    if name == "rloo":
        trainer = RLOOTrainer(args=RLOOConfig(**(settings(beta=0.0) | more)), **given)
        trainer._generate = lambda _: (prompts, answers, [""] * len(answers))
        return trainer
    options = {"beta": 0.0, **GRPO[name]}
    sampled = {"prompt_ids": prompts, "completion_ids": answers, "logprobs": sampler_logps()}
    trainer = GRPOTrainer(args=GRPOConfig(**(settings(**options) | more)), rollout_func=lambda *_: sampled, **given)
    trainer.use_vllm = "vllm_importance_sampling_mode" in options  # which vLLM need not be there for
    trainer._last_loaded_step = trainer.state.global_step
    return trainer


def golden(name: str) -> dict[str, Any]:
    import torch

    trainer, lengths = rig(name), [length for lengths in ANSWERS for length in lengths]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    worths = [worth for group in REWARDS for worth in group]
    inputs = trainer._generate_and_score_completions([{"prompt": "w4", "worth": worth} for worth in worths])
    trainer.model.load_state_dict({key: torch.tensor(value) for key, value in weights(CASE).items()})
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {
        ours: trainer._metrics["train"][theirs][0]
        for ours, theirs in (("entropy", "entropy"), ("kl", "kl"), ("clipped", "clip_ratio/region_mean"))
        if theirs in trainer._metrics["train"]
    }
    gradients = [p.grad.double() for p in trainer.model.parameters() if p.grad is not None]
    found = {
        "loss": loss.item(),
        "gradient_norm": float(torch.sqrt(sum((g**2).sum() for g in gradients))),
        "advantages": inputs["advantages"].view(len(PROMPTS), -1).tolist(),
        "metrics": metrics,
    }
    logp = {
        short: rounded([row[:length].tolist() for row, length in zip(inputs[column], lengths, strict=True)])
        for short, column in (("old", "old_per_token_logps"), ("ref", "ref_per_token_logps"))
        if column in inputs
    }
    return found | {"logp": logp}


NAMES = (*GRPO, "rloo")


if __name__ == "__main__":
    found = {name: golden(name) for name in NAMES}
    logps = {"sampler": sampler_logps()} | found["kl"]["logp"]
    cases = {name: {key: value for key, value in case.items() if key != "logp"} for name, case in found.items()}
    lines = [f' "{name}": {json.dumps(case)}' for name, case in (cases | {"logp": logps}).items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FILE}: {len(cases)} cases, {FILE.stat().st_size} bytes")
