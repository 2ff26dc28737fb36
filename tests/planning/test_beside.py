"""What this house and MaxText are asked for, how a program is read, and how the longest length is looked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ringbpt.config import UserError, parse, parse_args
from ringbpt.planning import beside
from ringbpt.planning.program import Program
from tests.planning.test_overlap import compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("count", "strategy"), [(8, "ring"), (8, "all_gather"), (8, "ulysses"), (64, "ulysses_ring")])
def test_both_are_asked_for_the_same(count, strategy):
    machine = {8: "v5p-16", 64: "v6e-64"}[count]
    config = parse(parse_args(beside.our_flags(machine, count, 32768, strategy)), count)
    assert config.mesh_shape.sp == count and config.execution.sequence_parallel == strategy
    assert config.execution.remat_block == "nothing_saveable" and "remat_policy=full" in beside.THEIRS
    assert config.dtype == "bf16" and "dtype=bfloat16" in beside.THEIRS
    assert config.train_dataset.batch_size == 1 and config.train_dataset.seq_length == 32768
    sizes = config.architecture
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size) == (4096, 11008, 32000)  # llama2-7b there too


def test_heads_that_cannot_be_dealt_out_are_refused_in_a_line():
    with pytest.raises(UserError, match="ulysses") as refused:
        parse(parse_args(beside.our_flags("v6e-64", 64, 32768, "ulysses")), 64)
    assert "\n" not in beside.reason(refused.value)
    theirs = ValueError(
        "1 validation error for X\n  Value error, TPU Ulysses needs heads. [type=value_error, input={}]\n  x"
    )
    assert beside.reason(theirs) == "TPU Ulysses needs heads."


TEXT = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %send = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}, SENT
  %kernel.7 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="f/shard_map/kernel"}
  %sent = f32[8]{0} collective-permute-done(%send)
  %w = bf16[8]{0} convert(%x), metadata={op_name="f/dot_general"}
  %all = bf16[8]{0} all-reduce(%w), replica_groups={{0,1}}, to_apply=%add
  ROOT %r = f32[8]{0} add(%sent, %kernel.7), metadata={op_name="f/add"}
}
""".replace("SENT", 'metadata={op_name="f/shard_map/ppermute"}')


def test_a_program_is_read_by_what_sends_and_what_hides():
    program = Program({"state": 100}, 20, 120, 0, [], TEXT)
    found = beside.read("theirs", program, (1, 2), ("data", "context"))
    assert found == {
        "arguments": 100,
        "total": 120,
        "hops": 1,
        "hidden": 1,
        "attention": 32,
        "rest": 16,
        "exposed": {"attention": 0, "rest": 16},
        "sent": {
            "context collective-permute f32 of attention": 32,
            "context all-reduce bf16 of rest": 16,
        },
        "behind": {"kernel": 32},
    }
    assert beside.read("ours", replace(program, text=""), (1, 1, 1, 2), ()) == {"arguments": 100, "total": 120}


@pytest.mark.parametrize("start", [{32: 200, 64: 240}, {32: 200, 1024: 1440}])
def test_the_longest_length_is_followed_to_the_limit(start):
    asked = []

    def total(tokens):
        asked.append(tokens)
        return 160 + tokens * 5 // 4

    found = beside.longest(total, start, limit=1000, unit=64)
    assert found == {"tokens": 640, "total": 960} and asked == [640]


def test_a_length_that_turns_out_too_long_is_shortened():
    grown = beside.longest(lambda tokens: tokens * tokens // 500, {256: 131, 512: 524}, limit=1000, unit=8)
    assert 0.95 * 1000 < grown["total"] <= 1000
    with pytest.raises(UserError, match="no length that fits"):
        beside.longest(lambda tokens: 2000, {256: 131, 512: 524}, limit=1000, unit=8)


@pytest.mark.slow
def test_our_side_is_compiled_and_read():
    """The whole model for eight TPUs: as the committed row has it, but for the compiler's version."""
    flags = beside.our_flags("v5p-16", 8, 32768, "ring")
    found = beside.read("ours", *beside.ours(compiler("v5p-16"), flags))
    known = json.loads((ROOT / "docs" / "peers.json").read_text())["v5p-16 32K ring"]["ours"]
    assert found["hops"] == found["hidden"] > 0 and found["exposed"]["attention"] < 0.01 * found["attention"]
    assert abs(found["total"] / known["total"] - 1) < 0.05
    assert abs(found["attention"] / known["attention"] - 1) < 0.01
