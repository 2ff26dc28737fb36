"""What a compiled step sends is what it must send: each kind of transfer as often as it has to go, and no more."""

import pytest

from ringbpt.attention.parallel.ring import GRADIENTS_SCOPE
from ringbpt.config import parse, parse_args
from ringbpt.planning.hlo import parse as program
from ringbpt.planning.overlap import ring_hops
from ringbpt.planning.program import compile_program
from ringbpt.planning.traffic import (
    ACTIVATIONS,
    AGAIN_FORWARD,
    BACKWARD,
    FORWARD,
    GRADIENTS,
    KEY_GRADIENTS,
    KEYS,
    WEIGHTS,
    traffic,
)
from ringbpt.reduction import SCOPE as SUMMED
from tests.planning.test_overlap import compiler

TOGETHER = """HloModule step, is_scheduled=true

ENTRY %main (kv: bf16[8], sums: f32[8]) -> bf16[8] {
  %kv = bf16[8]{0} parameter(0)
  %sums = f32[8]{0} parameter(1)
  %start = ((bf16[8]{0}, f32[8]{0}), (bf16[8]{0}, f32[8]{0})) collective-permute-start(%kv, %sums), \
source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/transpose(jvp())/attention/(ppermute:NAME/ppermute)"}
  %wait = (bf16[8]{0}, f32[8]{0}) collective-permute-done(%start)
  ROOT %kv2 = bf16[8]{0} get-tuple-element(%wait), index=0
}
"""
# As of several slices: no permute has a name. One brings K and V to a turn of attention, one a sum home.
NAMELESS = """HloModule step, is_scheduled=true

ENTRY %main (kv: bf16[8], sum: f32[8], x: f32[8]) -> (bf16[8], f32[8]) {
  %kv = bf16[8]{0} parameter(0)
  %sum = f32[8]{0} parameter(1)
  %x = f32[8]{0} parameter(2)
  %own = bf16[8]{0} copy(%kv)
  %start = (bf16[8]{0}, bf16[8]{0}) collective-permute-start(%own), source_target_pairs={{0,1},{1,0}}
  %start.1 = (f32[8]{0}, f32[8]{0}) collective-permute-start(%sum), source_target_pairs={{0,1},{1,0}}
  %many = f32[8]{0} multiply(%x, %x), metadata={op_name="jit(step)/transpose(jvp())/attention/mul"}
  %more = f32[8]{0} multiply(%x, %many), metadata={op_name="jit(step)/transpose(jvp())/attention/mul"}
  %kv2 = bf16[8]{0} collective-permute-done(%start)
  %home = f32[8]{0} collective-permute-done(%start.1)
  %copied = f32[8]{0} copy(%home)
  %added = f32[8]{0} add(%copied, %more), metadata={op_name="jit(step)/transpose(jvp())/WHERE/add"}
  ROOT %both = (bf16[8]{0}, f32[8]{0}) tuple(%kv2, %added)
}
"""
MODEL = (
    "--load_llama_config=debug",
    "--llama.hidden_size=512",
    "--llama.intermediate_size=1024",
    "--llama.num_hidden_layers=3",
    "--llama.num_attention_heads=4",
    "--llama.num_key_value_heads=4",
    "--llama.vocab_size=1024",
    "--llama.attention_type=ring_blockwise",
    "--dtype=bf16",
    "--train_dataset.json_dataset.batch_size=4",
)
LENGTHS = ("--train_dataset.json_dataset.seq_length=4096", "--llama.max_sequence_length=4096")
KEPT = "--llama.gathered_weights=keep"


def flows(mesh: str, *flags: str) -> dict[tuple[str, str], tuple[int, int | None]]:
    machine = compiler("v5p-16")
    config = parse(parse_args([*MODEL, *LENGTHS, f"--mesh_dim={mesh}", *flags]), len(machine.devices))
    found = traffic(program(compile_program(config, machine).text), config)
    return {(flow.what, flow.way): (flow.sent, flow.least) for flow in found}


@pytest.mark.parametrize(
    ("mesh", "flags", "again"),
    [
        ("1,1,1,8", (KEPT, "--llama.remat_block=save_attention", "--llama.reduce_dtype=bf16"), False),
        ("1,2,1,4", ("--llama.remat_block=nothing_saveable", "--llama.scan_mlp"), True),
        *(
            pytest.param("1,1,1,8", flags, again, marks=pytest.mark.slow)
            for flags, again in (
                (("--llama.remat_block=save_attention", "--llama.reduce_dtype=bf16"), False),
                ((KEPT, "--llama.remat_block=save_attention", "--llama.kv_heads_at_a_time=2"), False),
                ((KEPT, "--llama.remat_block=nothing_saveable", "--llama.scan_mlp"), True),
            )
        ),
    ],
)
def test_every_kind_goes_as_often_as_it_must(mesh, flags, again):
    found = flows(mesh, *flags)
    for name in ((KEYS, FORWARD), (KEYS, BACKWARD), (KEY_GRADIENTS, BACKWARD)):
        assert found[name][0] == found[name][1], name
    # Besides the norms', which the count of the least leaves out.
    gathered_again = [] if KEPT in flags else [(WEIGHTS, BACKWARD)]
    assert [name for name in found if name == (WEIGHTS, BACKWARD)] == gathered_again
    for name in ((WEIGHTS, FORWARD), *gathered_again, (GRADIENTS, BACKWARD)):
        sent, least = found[name]
        assert least and least <= sent <= 1.02 * least, (name, sent, least)
    # A second forward is the price of a policy that keeps nothing.
    assert ((KEYS, AGAIN_FORWARD) in found) == again


@pytest.mark.slow
def test_a_layer_in_blocks_of_one_chunk_holds_no_whole_gradient():
    """Each is summed behind parts of its own product; of several chunks there is one sum, as large as the weight."""
    blocks = ("--llama.remat_block=nothing_saveable", "--llama.kv_heads_at_a_time=2", "--llama.scan_mlp")
    machine, gradients = compiler("v5p-16"), []
    for chunk in (2048, 256):
        flags = (*blocks, f"--llama.scan_mlp_chunk_size={chunk}", "--mesh_dim=1,1,1,8")
        config = parse(parse_args([*MODEL, *LENGTHS, *flags]), len(machine.devices))
        gradients.append("f32[1024,512]" in compile_program(config, machine).text)  # of w_down
    assert gradients == [False, True]


@pytest.mark.parametrize(("mesh", "what"), [("1,1,2,1", ACTIVATIONS), ("1,2,1,1", GRADIENTS), ("1,1,1,2", GRADIENTS)])
def test_sums_of_products_over_tp_are_no_gradients_of_weights(mesh, what):
    text = """HloModule step, is_scheduled=true

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  ROOT %r = bf16[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%a, metadata={op_name="jvp()/dot_general"}
}
"""
    config = parse(parse_args([*MODEL, f"--mesh_dim={mesh}"]), 2)
    assert [(flow.what, flow.way, flow.sent) for flow in traffic(program(text), config)] == [(what, FORWARD, 16)]


def test_what_goes_at_once_is_told_apart():
    """A GPU's compiler sends K and V with the sums behind them, and joins their names."""
    text = TOGETHER.replace("NAME", GRADIENTS_SCOPE)
    config = parse(parse_args([*MODEL, "--mesh_dim=1,1,1,2"]), 2)
    found = {(flow.what, flow.way): flow.sent for flow in traffic(program(text), config)}
    assert found == {(KEYS, BACKWARD): 16, (KEY_GRADIENTS, BACKWARD): 32}
    [hop] = ring_hops(text)
    assert (hop.bytes, hop.backward) == (48, True)


@pytest.mark.parametrize(
    ("where", "what"), [(f"attention/{GRADIENTS_SCOPE}", KEY_GRADIENTS), (SUMMED, GRADIENTS)], ids=str
)
def test_what_lost_its_name_is_known_by_what_stands_beside_it(where, what):
    config = parse(parse_args([*MODEL, "--mesh_dim=1,1,1,2"]), 2)
    text = NAMELESS.replace("WHERE", where)
    found = {(flow.what, flow.way): flow.sent for flow in traffic(program(text), config)}
    assert found == {(KEYS, BACKWARD): 16, (what, BACKWARD): 32}
    assert len(ring_hops(text)) == 2 - (what == GRADIENTS)


def test_of_what_stands_beside_nothing_of_ours_no_hop_is_made():
    text = NAMELESS.replace("WHERE", "").replace("/attention/", "/")
    assert ring_hops(text) == []
