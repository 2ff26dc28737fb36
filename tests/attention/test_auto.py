"""`auto`: the fastest local attention that does what is asked, said once; and the table of block sizes behind it."""

import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ringbpt.attention import MaskSpec, api
from ringbpt.attention.local import block_sizes
from ringbpt.bench import autotune
from ringbpt.config import UserError, choices
from ringbpt.types import TokenMeta

V5E = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


def said(caplog, device, dtype, **sizes) -> list[str]:
    """What two traces of a forward log."""
    api._log_once.cache_clear()
    caplog.clear()
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
    meta = TokenMeta(*(jax.ShapeDtypeStruct((1, 256), jnp.int32),) * 2)
    with caplog.at_level(logging.INFO, logger="ringbpt"):
        local = api.LOCALS["auto"](device, sizes.get("queries"), sizes.get("keys"))
        for _ in range(2):
            jax.eval_shape(lambda x, meta: local.attend(x, x, x, meta, meta, MaskSpec()), x, meta)
    return [record.getMessage() for record in caplog.records]


def test_the_fastest_that_does_it_is_taken_and_said_once(caplog):
    assert said(caplog, CPU, jnp.float32) == ["attend on cpu: blockwise"]
    assert said(caplog, V5E, jnp.bfloat16) == ["attend on TPU v5 lite: pallas_tpu"]
    [line] = said(caplog, V5E, jnp.float16)
    assert line.startswith("attend on TPU v5 lite: blockwise; pallas_tpu computes in float32 or bfloat16, not float16")


def test_a_kernel_is_made_once_for_each_shape_and_direction(monkeypatch):
    """And may be another for the backward, whose queries are fewer in a ring."""
    made = []

    def make(name):
        monkeypatch.setitem(api.LOCALS, name, lambda *args, maker=api.LOCALS[name]: made.append(name) or maker(*args))

    for name in ("pallas_tpu", "blockwise"):
        make(name)
    local = api.LOCALS["auto"](V5E, None, None)

    def both(q, k, lse, q_meta, kv_meta):
        part = local.attend(q, k, k, q_meta, kv_meta, MaskSpec())
        return local.attend_bwd(q, k, k, q, lse, q, q_meta, kv_meta, MaskSpec()), part

    for dtype in (jnp.bfloat16, jnp.float16) * 2:
        q, k = (jax.ShapeDtypeStruct((1, length, 2, 64), dtype) for length in (128, 256))
        lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
        metas = (TokenMeta(*(jax.ShapeDtypeStruct(x.shape[:2], jnp.int32),) * 2) for x in (q, k))
        jax.eval_shape(lambda *args: both(*args), q, k, lse, *metas)  # a new function, so that it is traced again
    assert made == ["pallas_tpu"] * 2 + ["pallas_tpu", "blockwise"] * 2


def test_the_flag_offers_what_there_is():
    assert set(choices("llama.attention_kernel")) == set(api.LOCALS)
    assert all(name in api.LOCALS for names in api.FASTEST.values() for name in names)


def test_a_chunk_size_is_the_most_tokens_of_a_block():
    sizes = lambda head_dim: block_sizes.sizes("pallas_tpu", "TPU v4", head_dim, "backward", (1, 1))
    assert sizes(64) == sizes(128) == tuple(block_sizes.table()["pallas_tpu"]["v4"]["128"]["backward"])
    assert sizes(256) == sizes(512) == tuple(block_sizes.table()["pallas_tpu"]["v4"]["256"]["backward"])
    assert block_sizes.sizes("pallas_tpu", "a TPU to come", 128, "forward", (8, 9)) == (8, 9)
    assert [block_sizes.at_most(512, limit) for limit in (None, 128, 4096)] == [512, 128, 512]


def test_autotune_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.json"
    file.write_text(block_sizes.FILE.read_text())
    monkeypatch.setattr(block_sizes, "FILE", file)
    block_sizes.table.cache_clear()
    flags = ["--tokens=32", "--blocks=16,32", "--head_dim=8", "--heads=2", "--kv_heads=1", "--dtype=fp32"]
    try:
        assert autotune.main(flags) == 0
        entry = json.loads(file.read_text())["blockwise"]["cpu"]["8"]
        assert {*entry["forward"], *entry["backward"]} <= {16, 32}
        assert entry["from"].startswith("measured") and jax.__version__ in entry["from"]
        assert json.loads(file.read_text())["pallas_tpu"] == block_sizes.table()["pallas_tpu"]
        assert "8 backward (32, 16)" in capsys.readouterr().out
        assert block_sizes.sizes("blockwise", "cpu", 8, "forward", (1024, 1024)) == tuple(entry["forward"])
        assert autotune.main([*flags, "--budget_s=0"]) == 0
        assert "8: left out, for want of time: (16, 16), (16, 32)" in capsys.readouterr().out
        assert json.loads(file.read_text())["blockwise"]["cpu"]["8"] == entry
    finally:
        block_sizes.table.cache_clear()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--kernel=reference", "those that do: blockwise, "),
        ("--kernel=pallas_tpu", "this is cpu: use blockwise"),
        ("--heads=0", "--heads=0 is below 1"),
        ("--kv_heads=3", "--kv_heads=3 does not divide --heads=8"),
        ("--blocks=a", "--blocks=128,256,512,1024"),
        ("--dtype=int8", "none of fp32, bf16, fp16"),
        ("--block=128", "did you mean --blocks"),
    ],
)
def test_autotune_refuses_by_name(flag, message):
    with pytest.raises(UserError, match=message):
        autotune.main([flag, "--print_only", "--tokens=128"])
