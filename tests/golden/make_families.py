"""Tiny models of every family with random weights, made by transformers, and what it says of them.

    pip install 'ringbpt[oracle]' && python -m tests.golden.make_families

writes families.npz: for every case config.json, logits, some gradients of the mean next-token loss and a greedy
continuation, float32, so that the tests need no torch; the weights are drawn again (numpy's RandomState is frozen for
good). `live` makes the same at the time of a test, with the folder that save_pretrained writes.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("families.npz")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,  # greedy continuations go on to their end
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# name -> (model_type, settings beyond SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4, "rope_parameters": ROPE}),  # LLaMA 1 and 2
    "llama3": ("llama", {"rope_parameters": ROPE | {"rope_theta": 500000.0}}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama3.2": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16}),
    "codellama": ("llama", {"rope_parameters": ROPE | {"rope_theta": 1e6}}),
    "linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": YARN, "head_dim": 16}),
    "mistral": ("mistral", {"rope_parameters": ROPE, "sliding_window": 12, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE | {"rope_theta": 1e6}}),
    "qwen2.5": ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE | {"rope_theta": 1e6}, "head_dim": 16}),
    "mixtral": (
        "mixtral",
        {"rope_parameters": ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
}
LENGTHS = (40, 24)  # of two documents, which one row of ours packs
PROMPT, NEW_TOKENS = 16, 64


def documents() -> list[np.ndarray]:
    rng = np.random.RandomState(3)
    return [rng.randint(2, SIZES["vocab_size"], length) for length in LENGTHS]


# The gradients that the file keeps; `live` has all.
KEPT = (
    "embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.k_proj.bias",
    "layers.0.self_attn.q_norm.weight", "layers.1.mlp.down_proj.weight", "layers.0.block_sparse_moe.gate.weight",
    "layers.1.block_sparse_moe.experts.1.w2.weight", "layers.1.input_layernorm.weight",
)  # fmt: skip


def draw(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """float32 weights by their names in the file, large enough for every part of the model to matter."""
    rng = np.random.RandomState(0)

    def one(name: str, shape: list[int]) -> np.ndarray:
        x = rng.randn(*shape)
        if "norm" in name:
            return 1 + 0.3 * x
        return (0.6 if ".gate.weight" in name else 0.2) * x  # a router that is sure: rounding must not change its mind

    return {name: one(name, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def make_model(case: str, folder: Path, **more: Any) -> Any:
    """transformers' model, saved in `folder` by save_pretrained with the weights of `draw`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CASES[case]
    config = AutoConfig.for_model(kind, **SIZES | settings | more)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    write_weights(folder, draw({name: list(array.shape) for name, array in tensors(folder).items()}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def live(case: str, folder: Path, **more: Any) -> dict[str, np.ndarray]:
    """Saves the model into `folder`; returns logits, a greedy continuation, and gradients as `gradient/<tensor>`."""
    import torch

    model = make_model(case, folder, **more)
    tokens = [torch.tensor(document)[None] for document in documents()]
    logits = [model(token).logits[0] for token in tokens]
    losses = [
        torch.nn.functional.cross_entropy(logit[:-1], token[0, 1:], reduction="sum")
        for logit, token in zip(logits, tokens, strict=True)
    ]
    (sum(losses) / sum(length - 1 for length in LENGTHS)).backward()
    prompt = tokens[0][:, :PROMPT]
    continuation = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, PROMPT:].numpy()
    found = {"logits": torch.cat(logits).detach().numpy(), "continuation": continuation}
    with torch.no_grad():  # gradients in the weights' places, and saved, have the names and shapes of the file
        for weight in model.parameters():
            weight.copy_(weight.grad)
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other)
        return found | {f"gradient/{name}": array for name, array in tensors(Path(other)).items()}


def restore(case: str, folder: Path) -> dict[str, np.ndarray]:
    """The case's folder written again without torch, and what the file keeps of what `live` returned."""
    with np.load(FILE) as file:
        found = {name.removeprefix(f"{case}/"): file[name] for name in file.files if name.startswith(f"{case}/")}
    write_weights(folder, draw(json.loads(str(found.pop("shapes")))))
    (folder / "config.json").write_text(str(found.pop("config")))
    return found


def main() -> None:
    arrays: dict[str, Any] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = live(case, folder)
            kept = {key: x for key, x in found.items() if not key.startswith("gradient/") or key.endswith(KEPT)}
            shapes = {name: list(array.shape) for name, array in tensors(folder).items()}
            kept |= {"shapes": json.dumps(shapes), "config": (folder / "config.json").read_text()}
        arrays |= {f"{case}/{key}": value for key, value in kept.items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
