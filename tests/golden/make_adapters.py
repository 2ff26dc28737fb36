"""Writes adapters.npz: what PEFT makes of low-rank pairs beside a tiny LLaMA in float32, and adapters that it saved.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 && python -m tests.golden.make_adapters

For each case: the folder that save_pretrained writes, the mean cross-entropy of the documents of make_llama.py, its
gradients towards each pair, and the logits of the first document. The pairs are drawn again by numpy's RandomState.
"""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import make_llama

CASE = "llama3"  # grouped heads, wider than the model's dim over their number
FILE = Path(__file__).with_name("adapters.npz")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": ALL},
    "all-linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"model.layers.1.self_attn.q_proj": 12},
    },
    "one layer": {"r": 3, "lora_alpha": 3, "target_modules": ["v_proj"], "layers_to_transform": [1]},
}  # fmt: skip


def adapted(case: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"tie_word_embeddings": False, "max_position_embeddings": 96, "use_cache": False, **make_llama.SIZES}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **make_llama.CASES[CASE]))
    base.load_state_dict({name: torch.tensor(value) for name, value in make_llama.weights(CASE).items()})
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **CASES[case]))
    rng = np.random.RandomState(11)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            if "lora_" in name:
                param.copy_(torch.tensor(rng.randn(*param.shape).astype(np.float32) * 0.2))
    return model.eval()


def golden(case: str) -> dict[str, np.ndarray]:
    import torch

    model, total, count = adapted(case), 0.0, 0
    texts = [torch.tensor(np.asarray(document)[None], dtype=torch.long) for document in make_llama.documents(CASE)]
    for text in texts:
        logp = torch.log_softmax(model(text).logits[:, :-1], -1)
        total = total - logp.gather(2, text[:, 1:, None]).sum()
        count += text.shape[1] - 1
    loss = total / count
    loss.backward()
    found = {"loss": np.float64(loss.item()), "logits": model(texts[0]).logits.detach().numpy()[0]}
    for name, param in model.named_parameters():
        if "lora_" in name:
            found[f"grad {name.replace('.default', '')}"] = param.grad.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            found[file] = np.frombuffer((Path(folder) / file).read_bytes(), np.uint8)
    return found


def restore(case: str, folder: Path) -> dict[str, np.ndarray]:
    """The case's folder again, and its numbers."""
    with np.load(FILE) as file:
        found = {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{case}/")}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(found.pop(name).tobytes())
    return found


if __name__ == "__main__":
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f"{case}/{name}": x for case in CASES for name, x in golden(case).items()})
    FILE.write_bytes(buffer.getvalue())
    print(f"{FILE}: {json.dumps(list(CASES))}, {len(buffer.getvalue()):,} bytes")
