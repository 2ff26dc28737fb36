"""The account of memory beside what three compilers say of real sizes: within 15 % of the total.

python -m pytest tests/planning/test_account.py -m "" -s          prints both
"""

import pytest

from ringbpt.config import UserError, parse, parse_args
from ringbpt.planning.report import GIB, Plan, make_plan
from ringbpt.planning.topologies import need, topology
from ringbpt.training.memory import closed_form

FP32, BF16 = "--dtype=fp32", "--dtype=bf16"
KEPT, AWAY = "--llama.remat_block=nothing_saveable", "--llama.remat_block=offload_inputs"
BLOCKS, OVER_TP = "--llama.kv_heads_at_a_time=1", "--llama.residual_over_tp"
STATE, PARAMS = "--optimizer.offload_state", "--optimizer.offload_params"
K = 1024
LLAMA8 = ("--llama.intermediate_size=14336", "--llama.num_key_value_heads=8", "--llama.vocab_size=128256")
LORA = ("--lora.rank=32", "--lora.base_dtype=bf16")
QLORA = ("--lora.rank=32", "--lora.base_dtype=nf4", "--lora.double_quantization")

# topology, mesh, model (a preset, and what differs from it), rows, tokens of each, flags
CASES = [
    ("h200", "1,1,1,1", ("1b",), 1, 128 * K, (BF16, KEPT)),
    ("cpu-8", "1,1,1,8", ("1b",), 1, 64 * K, (FP32, KEPT, BLOCKS)),
    ("cpu-8", "1,2,2,2", ("1b",), 2, 16 * K, (FP32, KEPT)),
    ("8xh200", "1,1,1,8", ("7b",), 1, 1024 * K, (BF16, KEPT)),
    ("8xh200", "1,1,1,8", ("7b",), 1, 1024 * K, (BF16, KEPT, BLOCKS)),
    ("8xh200", "1,1,2,4", ("7b",), 1, 512 * K, (BF16, KEPT)),
    ("8xh100-80g", "1,8,1,1", ("7b",), 8, 32 * K, (BF16, KEPT)),
    ("8xh100-80g", "1,2,2,2", ("7b",), 2, 128 * K, (BF16, KEPT, OVER_TP, BLOCKS)),
    ("8xh100-80g", "1,1,1,8", ("7b", *LLAMA8), 1, 2048 * K, (BF16, AWAY, STATE, BLOCKS)),
    ("h100-80g", "1,1,1,1", ("7b", *LLAMA8), 1, 500 * K, (BF16, AWAY, STATE, PARAMS, BLOCKS)),
    ("rtx4090", "1,1,1,1", ("7b", *LLAMA8), 1, 256 * K, (BF16, AWAY, BLOCKS, *QLORA)),
    ("8xh100-80g", "1,1,1,8", ("7b", *LLAMA8), 1, 1024 * K, (BF16, KEPT, *LORA)),
    ("v5e-8", "1,1,1,8", ("7b",), 1, 64 * K, (BF16, KEPT, *QLORA)),
    ("v5e-8", "1,1,1,8", ("7b",), 1, 128 * K, (BF16, KEPT, STATE, PARAMS, BLOCKS)),
    ("8xa100-80g", "1,1,1,8", ("13b",), 1, 128 * K, (FP32, KEPT, BLOCKS)),
    ("v4-512", "1,1,4,64", ("7b",), 1, 2048 * K, (BF16, KEPT)),
    ("v4-512", "1,1,4,64", ("7b",), 1, 8192 * K, (BF16, KEPT, OVER_TP, BLOCKS)),
]  # fmt: skip


def planned(name: str, mesh: str, model: tuple[str, ...], rows: int, length: int, flags: tuple[str, ...]) -> Plan:
    try:
        need({"v": "tpu", "c": "cpu"}.get(name[0], "cuda"))
    except UserError as error:
        pytest.skip(str(error))
    (preset, *differences), source, machine = model, "--train_dataset.json_dataset", topology(name)
    words = ["--llama.attention_type=ring_blockwise", f"--mesh_dim={mesh}", *flags, *differences]
    words += [] if "--llama.scan_mlp=False" in flags else ["--llama.scan_mlp"]
    words += [f"--load_llama_config={preset}", f"{source}.batch_size={rows}", f"{source}.seq_length={length}"]
    words += [f"--llama.max_sequence_length={length}"]
    return make_plan(parse(parse_args(words), len(machine.devices)), machine)


@pytest.mark.slow  # training/test_memory.py has three that every test run compiles
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_account_is_within_15_percent(case):
    plan = planned(*case)
    compiled, account = plan.program.total, closed_form(plan.config, plan.machine.platform)
    assert account is not None
    named = sum(account.values())
    print(f"\n{case}: account {named / GIB:.2f} GiB, compiled {compiled / GIB:.2f} GiB, {named / compiled - 1:+.1%}")
    assert abs(named / compiled - 1) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "flags"), [("8xh200", LLAMA8, ()), ("v4-16", (), (BLOCKS,)), ("8xh200", (), (BLOCKS,))]
)
def test_a_step_takes_no_more_memory_on_a_longer_ring(name, model, flags):
    """Temporaries of 8 layers of 7b, or with grouped heads, 16,384 tokens a device, weights over fsdp times sp.

    With two devices no hop follows another, and no K and V are in flight while others are computed with. Where all
    heads travel at once two devices need that much less: 7b 9 %, grouped heads 2.5 % on H200 and 3.6 % on v4. From four
    on it stays.
    """
    layers = ("7b", *model, "--llama.num_hidden_layers=8")
    temporaries = [
        planned(name, f"1,{8 // sp},1,{sp}", layers, 8 // sp, sp * 16 * K, (BF16, KEPT, *flags)).program.temporaries
        for sp in (2, 4, 8)
    ]
    print(f"\n{name} {model} {flags}: {[round(size / 2**20, 1) for size in temporaries]} MiB")
    two, four, eight = temporaries
    assert four < (1.02 if BLOCKS in flags else 1.03) * two and eight < 1.005 * four
