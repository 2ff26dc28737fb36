"""Writes llama.npz: what transformers' own LLaMA, in float64, makes of four tiny models.

    pip install torch transformers && python -m tests.golden.make_llama

For each case: the logits of every place and the gradients of the mean next-token loss for a few weights. The weights
and tokens themselves are drawn again by whoever compares (numpy's RandomState is frozen for good), so that the file
stays small. transformers keeps its norms and its rotation in float32 whatever the model's dtype.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("llama.npz")
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
# What transformers' LlamaConfig is told beyond SIZES; a row of the batch holds documents of these lengths.
CASES = {
    "mha": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gqa_tied": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # 16, so that one wavelength (32 of 64 positions) lies where llama3 blends, and heads are wider than D / N.
    "llama3": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}
LENGTHS = {"mha": (96,), "gqa_tied": (60, 36), "llama3": (96,), "linear": (33, 63)}
GRADIENTS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)


def weights(case: str) -> dict[str, np.ndarray]:
    """float32, by transformers' names; large enough for every part of the model to matter."""
    D, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    H = CASES[case]["head_dim"]
    NH, KH = SIZES["num_attention_heads"] * H, CASES[case]["num_key_value_heads"] * H
    layer = {
        "self_attn.q_proj": (NH, D), "self_attn.k_proj": (KH, D), "self_attn.v_proj": (KH, D),
        "self_attn.o_proj": (D, NH), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}": s for i in range(SIZES["num_hidden_layers"]) for name, s in layer.items()}
    shapes |= {"model.embed_tokens": (V, D), "model.norm": (D,)}
    if not CASES[case].get("tie_word_embeddings"):
        shapes |= {"lm_head": (V, D)}
    rng = np.random.RandomState(0)
    draw = {name: rng.randn(*shape) for name, shape in shapes.items()}
    return {f"{name}.weight": (0.2 * x if x.ndim == 2 else 1 + 0.3 * x).astype(np.float32) for name, x in draw.items()}


def documents(case: str) -> list[np.ndarray]:
    rng = np.random.RandomState(1)
    return [rng.randint(0, SIZES["vocab_size"], length) for length in LENGTHS[case]]


def golden(case: str) -> dict[str, np.ndarray]:
    """float32: "logits" [T, V], each document alone, one after the other; and the gradients by their weights' names.

    The loss is the mean over all places but the last of each document.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"tie_word_embeddings": False, "max_position_embeddings": 96, **SIZES, **CASES[case]}
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float64)
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights(case).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if settings["tie_word_embeddings"] else [])
    tokens = [torch.tensor(document) for document in documents(case)]
    logits = [model(token[None]).logits[0] for token in tokens]
    losses = [
        torch.nn.functional.cross_entropy(logit[:-1], token[1:], reduction="sum")
        for logit, token in zip(logits, tokens, strict=True)
    ]
    (sum(losses) / sum(len(token) - 1 for token in tokens)).backward()
    named = dict(model.named_parameters())
    arrays = {"logits": torch.cat(logits).detach()} | {name: named[name].grad for name in GRADIENTS}
    return {name: array.numpy().astype(np.float32) for name, array in arrays.items()}


if __name__ == "__main__":
    arrays = {f"{case}/{name}": array for case in CASES for name, array in golden(case).items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")
