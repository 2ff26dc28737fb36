"""The account of memory against compiled programs: the 1b model's own step, from abstract arrays.

python -m pytest tests/training/test_memory.py -s          prints the account beside the compiler's number
"""

from dataclasses import replace

import pytest

from ringbpt.config import PRESETS, Config, LoraConfig, OptimizerConfig
from ringbpt.dims import MeshShape
from ringbpt.training.memory import ARGUMENTS, KEEPING_FRACTION, account, closed_form, decided, describe
from tests.flags import llama_flags
from tests.model.test_programs import compile_step

MIB = 2**20
ONE_B = {
    **PRESETS["1b"],
    "num_key_value_heads": 16,
    "head_dim": 128,
    "attention_type": "ring_blockwise",
    "sequence_layout": "zigzag",
    "scan_query_chunk_size": 256,
    "scan_key_chunk_size": 256,
    "scan_mlp": True,
    "scan_mlp_chunk_size": 256,
    "loss_chunk_size": 256,
    "remat_block": "nothing_saveable",
}
FULL = LoraConfig()  # no adapters: all weights are trained


def config_of(mesh, dtype="fp32", lora=FULL, **llama) -> Config:
    return Config(dtype=dtype, mesh_shape=mesh, lora=lora, **llama_flags(**ONE_B | llama))


def check(mesh, rows, length, tolerance=0.1, dtype="fp32", lora=FULL, **llama):
    """The named parts sum to the compiler's temporary bytes, and the state to its arguments."""
    config = config_of(mesh, dtype, lora, **llama)
    parts = account(config, rows, length)
    memory = compile_step(mesh, llama_flags(**ONE_B | llama), rows, length, dtype, lora).memory_analysis()
    temporary = sum(size for name, size in parts.items() if name not in ARGUMENTS)
    print(f"\nmesh {mesh}, {rows} x {length} tokens, {dtype}, {lora if lora.rank else ''} {llama}")
    for name, size in parts.items():
        print(f"  {name:<30} {size / MIB:8.1f} MiB")
    print(f"  temporary: named {temporary / MIB:.1f} MiB, compiled {memory.temp_size_in_bytes / MIB:.1f} MiB")
    state = sum(parts.get(name, 0) for name in ARGUMENTS)
    assert abs(state / memory.argument_size_in_bytes - 1) < 0.01
    assert abs(temporary / memory.temp_size_in_bytes - 1) < tolerance


@pytest.mark.parametrize(
    ("mesh", "rows", "length"),
    [
        *(pytest.param((1, 1, 1, 8), 1, length, marks=pytest.mark.slow) for length in (16384, 65536)),
        ((1, 2, 2, 2), 2, 16384),
    ],
    ids=str,
)
def test_the_1b_step_is_accounted_for(mesh, rows, length):
    check(mesh, rows, length)


@pytest.mark.slow
def test_grouped_keys_and_saved_attention_are_accounted_for():
    check((1, 1, 1, 8), 1, 65536, num_key_value_heads=4, remat_block="save_attention")


@pytest.mark.slow
def test_a_large_vocabulary_fills_the_loss():
    check((1, 1, 1, 8), 1, 16384, vocab_size=128256, num_hidden_layers=4, loss_chunk_size=1024)


@pytest.mark.slow
def test_bf16_is_accounted_for():
    """The CPU, which has no bf16, computes in float32, and turns all saved inputs into it at once."""
    check((1, 1, 1, 8), 1, 16384, dtype="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("llama", [{}, {"kv_heads_at_a_time": 1}], ids=str)
def test_where_tokens_outweigh_weights_attention_is_the_fullest(llama):
    """Going back, with the keys, their gradients and a hop's on their way; not so in blocks of heads."""
    check((1, 1, 1, 8), 1, 262144, num_hidden_layers=4, **llama)


@pytest.mark.slow
@pytest.mark.parametrize("llama", [{}, {"kv_heads_at_a_time": 1}], ids=str)
def test_gathered_weights_that_are_kept_are_accounted_for(llama):
    check((1, 1, 1, 8), 1, 16384, gathered_weights="keep", tolerance=0.02, **llama)


SLOW = pytest.mark.slow
FP32, BF16, INT8 = (LoraConfig(rank=rank, base_dtype=name) for name, rank in (("fp32", 16), ("bf16", 16), ("int8", 64)))
NF4, DOUBLE = LoraConfig(rank=16, base_dtype="nf4"), LoraConfig(rank=64, base_dtype="nf4", double_quantization=True)
BLOCKS = {"kv_heads_at_a_time": 1}


@pytest.mark.parametrize(
    ("mesh", "length", "lora", "llama"),
    [
        pytest.param((1, 1, 1, 8), 16384, FP32, {}, marks=SLOW),
        pytest.param((1, 1, 1, 8), 65536, DOUBLE, {}, marks=SLOW),
        pytest.param((1, 1, 1, 8), 65536, BF16, BLOCKS, marks=SLOW),
        pytest.param((1, 2, 2, 2), 16384, NF4, {}, marks=SLOW),
        pytest.param((1, 1, 1, 1), 16384, INT8, BLOCKS, marks=SLOW),
        ((1, 1, 1, 1), 4096, DOUBLE, {}),
    ],
    ids=str,
)
def test_adapters_are_accounted_for(mesh, length, lora, llama):
    """The CPU has no bf16, so it turns a base in it into float32 at once."""
    check(mesh, mesh[1], length, lora=lora, num_hidden_layers=4, **llama)


def test_what_grows_with_what():
    """Each part depends on the flags that it should, exactly: at one moment, where a layer's feedforward goes back."""
    tokens = 65536
    base = account(config_of((1, 1, 1, 8)), 1, tokens)
    assert base["saved layer inputs"] == 22 * 8192 * 2048 * 4
    assert base["optimizer"] == pytest.approx(2 * base["params"], rel=1e-3)
    longer = account(config_of((1, 1, 1, 8)), 1, 2 * tokens)
    assert longer["saved layer inputs"] == 2 * base["saved layer inputs"]
    same = ("params", "optimizer", "gradients", "unembedding", "layer weights")
    assert all(longer[name] == base[name] for name in same)
    half = account(config_of((1, 1, 2, 8)), 1, tokens)
    assert all(half[name] == base[name] / 2 for name in ("unembedding", "layer weights"))
    assert half["saved layer inputs"] == base["saved layer inputs"]
    saved = account(config_of((1, 1, 1, 8), remat_block="save_attention"), 1, tokens)
    assert saved["saved layer inputs"] == 2 * base["saved layer inputs"] + 22 * 8192 * 16 * 4
    keeps = account(config_of((1, 1, 2, 8), "bf16", gathered_weights="keep"), 1, tokens, "tpu")
    assert keeps["kept weights"] == 22 * 2048 * (3 * 5504 + 4 * 2048) // 2 * 2
    wide, bf16 = (account(config_of((1, 1, 1, 8), dtype), 1, tokens, "tpu") for dtype in ("fp32", "bf16"))
    assert bf16["saved layer inputs"] == wide["saved layer inputs"] / 2 and bf16["gradients"] == wide["gradients"]
    assert account(config_of((1, 1, 1, 8), "bf16"), 1, tokens) == base  # a CPU computes in float32


def test_the_fullest_moment_is_another_with_other_sizes():
    """On a CPU: with few tokens none of a layer's, then its feedforward's, then its attention's."""
    few, some, many = (
        account(config_of((1, 1, 1, 8), num_hidden_layers=layers), 1, tokens)
        for layers, tokens in ((4, 2048), (22, 65536), (4, 262144))
    )
    assert few["loss chunk"] > 0 == few["layer weights"]
    assert some["loss chunk"] == 0 and some["layer weights"] > 3 * 2048 * 5504 * 12
    assert many["loss chunk"] == 0 and many["layer weights"] < 3 * 2048 * 5504 * 4  # attention's alone


def test_a_base_is_kept_and_has_no_gradients():
    """Of 1b's 22 layers, 2048 x (4 x 2048 + 3 x 5504) numbers each, and of its two tables of 32,000 x 2048."""
    numbers, tables, norms = 22 * 2048 * (4 * 2048 + 3 * 5504), 2 * 32000 * 2048 * 4, 45 * 2048 * 4
    full = account(config_of((1, 1, 1, 1)), 1, 16384)
    for lora, bytes_ in ((FP32, 4), (BF16, 2), (INT8, 1 + 4 / 64), (NF4, 0.5 + 4 / 64)):
        parts = account(config_of((1, 1, 1, 1), lora=lora), 1, 16384)
        kept = numbers * bytes_ + tables / (2 if lora is BF16 else 1) + norms
        assert parts["base"] == pytest.approx(kept, rel=1e-3)
        assert parts["params"] == 22 * lora.rank * (4 * 2 * 2048 + 3 * (2048 + 5504)) * 4
        assert parts["optimizer"] == pytest.approx(2 * parts["params"], rel=1e-3)
        assert parts["gradients"] == parts["params"] and parts["unembedding"] == 0
        assert parts["layer weights"] < full["layer weights"] / 2
    half = account(config_of((1, 1, 1, 2), lora=NF4), 1, 16384)
    assert half["base"] == pytest.approx(kept / 2, rel=1e-3)


def test_accumulation_trades_activations_for_a_second_set_of_gradients():
    config = config_of((1, 1, 1, 8))
    split = replace(config, optimizer=OptimizerConfig(accumulate_gradient_steps=4))
    one, parts = account(config, 4, 16384), account(split, 4, 16384)
    assert parts["saved layer inputs"] == one["saved layer inputs"] / 4
    assert parts["gradients"] == one["gradients"] + one["params"]


def test_a_pod_needs_no_devices():
    assert account(config_of((1, 1, 4, 64)), 1, 2**21)["params"] > 0


NO_COUNT = [{"remat_block": ""}, {"scan_mlp": False}, {"attention_type": "standard"}, {"sequence_parallel": "ulysses"}]


@pytest.mark.parametrize("llama", NO_COUNT, ids=str)
def test_programs_without_a_count_are_refused(llama):
    with pytest.raises(NotImplementedError, match="--llama"):
        account(config_of((1, 1, 1, 8), **llama), 1, 16384)


def test_the_start_up_line_warns_before_the_compile():
    config = config_of((1, 1, 1, 8), "bf16")
    sized = replace(config.train_dataset.json_dataset, seq_length=16384, batch_size=1)
    short = replace(config, train_dataset=replace(config.train_dataset, json_dataset=sized))
    sized = replace(sized, seq_length=2**23)
    long = replace(config, train_dataset=replace(config.train_dataset, json_dataset=sized))
    assert describe(short, "cpu").endswith("GiB a device by the closed form")
    assert describe(short, "TPU v4").endswith("of 30.75 GiB")
    assert "WARNING: it will hardly fit; python -m ringbpt.plan" in describe(long, "TPU v4")
    unknown = describe(config_of((1, 1, 1, 8), scan_mlp=False), "TPU v4")
    assert unknown.startswith("memory not estimated: python -m ringbpt.plan with these flags and --topology=")


def test_the_start_up_line_knows_the_base():
    """8B, 32,768 tokens, on a GPU of 24 GB: 15 GiB of bfloat16 leave too little, 5.3 GiB in nf4 do not."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256}
    lines = []
    for lora in (BF16, NF4):
        config = config_of((1, 1, 1, 1), "bf16", lora, **sizes)
        sized = replace(config.train_dataset.json_dataset, seq_length=32768, batch_size=1)
        config = replace(config, train_dataset=replace(config.train_dataset, json_dataset=sized))
        lines.append(describe(config, "NVIDIA GeForce RTX 4090"))
        total = sum(account(config, 1, 32768, "cuda").values()) / 2**30
        assert f"memory about {total:.2f} GiB a device" in lines[-1] and "of 23.65 GiB" in lines[-1]
    assert "WARNING" in lines[0] and "WARNING" not in lines[1]


def test_gathered_weights_are_kept_where_memory_allows():
    config = config_of((1, 1, 1, 8), "bf16", gathered_weights="auto")
    ways = {way: config_of((1, 1, 1, 8), "bf16", gathered_weights=way) for way in ("keep", "again")}
    needed = sum((closed_form(ways["keep"], "tpu") or {}).values())
    enough = int(needed / KEEPING_FRACTION) + 1
    assert decided(config, "tpu", enough) == ways["keep"]
    assert decided(config, "tpu", enough - 10) == decided(config, "cpu", None) == ways["again"]
    assert decided(ways["keep"], "tpu", 0) == ways["keep"]
    alone, away = replace(config, mesh_shape=MeshShape(1, 1, 8, 1)), replace(config.optimizer, offload_params=True)
    for other in (alone, replace(config, optimizer=away)):
        assert decided(other, "tpu", 2**50).execution.gathered_weights == "again"
