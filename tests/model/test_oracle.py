"""Our model against transformers' LLaMA, from golden/llama.npz: logits, log-probabilities and gradients.

A row of ours holds one document or two, packed; transformers saw each alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention import permutation
from ringbpt.layouts import inverse
from ringbpt.mesh import put_batch
from ringbpt.types import Batch
from tests.golden.make_llama import CASES, FILE, GRADIENTS, SIZES, documents, golden, weights
from tests.model.helpers import make_model

L, D = SIZES["num_hidden_layers"], SIZES["hidden_size"]


def llama_flags(case: str) -> dict:
    """The same model in our flags."""
    rope = CASES[case]["rope_parameters"]
    return SIZES | {
        "num_key_value_heads": CASES[case]["num_key_value_heads"],
        "head_dim": CASES[case]["head_dim"],
        "tie_word_embeddings": CASES[case].get("tie_word_embeddings", False),
        "theta": rope["rope_theta"],
        "rope_scaling_type": rope["rope_type"].replace("default", ""),
        "rope_scaling_factor": rope.get("factor", 1.0),
        "rope_scaling_low_freq_factor": rope.get("low_freq_factor", 1.0),
        "rope_scaling_high_freq_factor": rope.get("high_freq_factor", 4.0),
        "rope_scaling_original_length": rope.get("original_max_position_embeddings", 8192),
    }


def our_params(case: str, theirs: dict | None = None) -> dict:
    """theirs: other weights than the case's own, by transformers' names."""
    theirs, H = theirs or weights(case), CASES[case]["head_dim"]

    def stacked(name, convert=lambda w: w):
        return np.stack([convert(theirs[f"model.layers.{i}.{name}.weight"]) for i in range(L)])

    def heads(w_nD):  # (N H) D -> D N H
        return w_nD.T.reshape(D, -1, H)

    params = {
        "embed": theirs["model.embed_tokens.weight"],
        "layers": {
            "attention_norm": stacked("input_layernorm"),
            "w_q": stacked("self_attn.q_proj", heads),
            "w_k": stacked("self_attn.k_proj", heads),
            "w_v": stacked("self_attn.v_proj", heads),
            "w_o": stacked("self_attn.o_proj", lambda w_Dn: w_Dn.T.reshape(-1, H, D)),  # D (N H) -> N H D
            "feedforward_norm": stacked("post_attention_layernorm"),
            "w_gate": stacked("mlp.gate_proj", np.transpose),
            "w_up": stacked("mlp.up_proj", np.transpose),
            "w_down": stacked("mlp.down_proj", np.transpose),
        },
        "norm": theirs["model.norm.weight"],
    }
    return params if "lm_head.weight" not in theirs else params | {"unembed": theirs["lm_head.weight"].T}


def their_gradients(grads: dict) -> dict[str, np.ndarray]:
    """Ours by their names and in their shapes, those of GRADIENTS."""
    w_k = grads["layers"]["w_k"][0]
    ours = (grads["embed"], w_k.reshape(D, -1).T, grads["layers"]["w_down"][1].T)
    return dict(zip(GRADIENTS, map(np.asarray, ours), strict=True))


def make_batch(case: str, model) -> Batch:
    docs = documents(case)
    token = np.concatenate(docs)[None].astype(np.int32)
    target = np.concatenate([np.append(doc[1:], 0) for doc in docs])[None].astype(np.int32)
    weight = np.concatenate([np.arange(len(doc)) < len(doc) - 1 for doc in docs])[None].astype(np.float32)
    position = np.concatenate([np.arange(len(doc)) for doc in docs])[None].astype(np.int32)
    segment = np.concatenate([np.full(len(doc), i + 1) for i, doc in enumerate(docs)])[None].astype(np.int32)
    host = Batch(token, target, weight, position, segment)
    return put_batch(lambda *rows: host, token.shape, model.mesh, model.execution.sequence_layout)


# The plainest program there is, and the one that users run: what they share is the model itself.
PLAIN = {"attention_type": "standard", "scan_layers": False, "scan_mlp": False, "loss_chunk_size": 96}
PROGRAMS = {"one device": ((1, 1, 1, 1), "contiguous", PLAIN), "tp=2, sp=2": ((1, 1, 2, 2), "zigzag", {})}


# For `make test`: every model once, and every program.
COVER = {("mha", "one device"), ("gqa_tied", "one device"), ("llama3", "tp=2, sp=2"), ("linear", "one device")}
PAIRS = [
    pytest.param(case, *how, id=f"{case}-{name}", marks=[] if (case, name) in COVER else pytest.mark.slow)
    for case in CASES
    for name, how in PROGRAMS.items()
]


@pytest.mark.parametrize(("case", "mesh", "layout", "program"), PAIRS)
def test_same_as_transformers(case, mesh, layout, program):
    with np.load(FILE) as file:
        want = {name: file[f"{case}/{name}"] for name in ("logits", *GRADIENTS)}
    model = make_model(mesh, sequence_layout=layout, **llama_flags(case), **program)
    batch, params = make_batch(case, model), jax.device_put(our_params(case), model.shardings)

    def loss(params):
        stats = model.token_stats(params, batch)
        hidden_BTD = model.hidden(params, batch.token_BT, batch.meta)
        return -jnp.sum(stats.logp_BT * batch.weight_BT) / jnp.sum(batch.weight_BT), (stats, hidden_BTD)

    grads, (stats, hidden_BTD) = jax.jit(jax.grad(loss, has_aux=True))(params)

    to_text = inverse(permutation(layout, batch.token_BT.shape[1], mesh[3]))
    unembed_DV = params.get("unembed", params["embed"].T)
    logits_TV = np.asarray(hidden_BTD, np.float64)[0, to_text] @ np.asarray(unembed_DV, np.float64)
    np.testing.assert_allclose(logits_TV, want["logits"], rtol=0, atol=2e-5)

    want_TV = want["logits"].astype(np.float64)
    logp_TV = want_TV - np.log(np.exp(want_TV).sum(axis=1, keepdims=True))
    target_T = np.asarray(batch.target_BT)[0, to_text]
    logp_T = logp_TV[np.arange(len(target_T)), target_T]
    np.testing.assert_allclose(np.asarray(stats.logp_BT)[0, to_text], logp_T, rtol=0, atol=2e-5)
    entropy_T = -np.sum(np.exp(logp_TV) * logp_TV, axis=1)
    np.testing.assert_allclose(np.asarray(stats.entropy_BT)[0, to_text], entropy_T, rtol=0, atol=2e-5)

    for name, got in their_gradients(grads).items():
        assert np.abs(got - want[name]).max() <= 2e-5 * np.abs(want[name]).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_golden_file_is_what_transformers_says(case):
    """Needs the extra `oracle`, which `make test-all` installs: without it this fails, and is never skipped."""
    with np.load(FILE) as file:
        for name, live in golden(case).items():
            np.testing.assert_allclose(file[f"{case}/{name}"], live, rtol=0, atol=1e-5 * np.abs(live).max())
