"""The cost model of a step, the rates behind it, and the published runs that both are held to."""

import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from ringbpt import hardware, rates
from ringbpt.config import parse as parse_config
from ringbpt.config import parse_args
from ringbpt.model.flops import forward_flops
from ringbpt.planning.attention_runs import kernel_of, runs_again
from ringbpt.planning.estimate import attends_again, estimate, step_flops
from ringbpt.planning.hlo import Computation, Module, parse
from ringbpt.planning.overlap import Hop
from ringbpt.planning.program import compile_program
from ringbpt.planning.step_time import UNHIDDEN, Pass, Work, bracket
from ringbpt.planning.topologies import topology
from ringbpt.rates import FILE, Links
from tests.planning.fit_shares import completed, made, written
from tests.planning.published import published, summary, table
from tests.planning.test_overlap import compiler
from tests.planning.test_plan import config_of

V5P = hardware.find("v5p")
PEAK = V5P.bf16_tflops * 1e12
BEST, WORST = (getattr(rates.attention_share(V5P, "pallas_tpu", 256), way) for way in ("best", "worst"))


def test_nine_of_ten_published_runs_that_nothing_was_fitted_to_lie_in_their_brackets():
    """Every run's own page says its seconds; which are left out was settled before the first fit."""
    runs = published()
    left_out, fitted = ([run for run in runs if run.fit is way] for way in (False, True))
    print(f"\n{table(runs)}\nfitted: {summary(fitted)}\nleft out: {summary(left_out)}")
    assert len(left_out) >= 30
    assert sum(run.inside for run in left_out) >= 0.9 * len(left_out)
    assert all(run.inside for run in fitted)
    assert all(run.bracket.high <= 1.6 * run.bracket.low for run in runs)


def test_no_more_is_in_the_open_at_worst_than_fitted_runs_allow():
    """Of those that send for a tenth of their time or more; what is left out is not looked at."""
    runs = [run for run in published() if run.fit and run.work.others[1] > 0.1 * run.seconds]
    open_at_most = {run.topology: (run.seconds - run.bracket.low) / run.work.others[1] for run in runs}
    assert open_at_most == {"v6e-256": pytest.approx(0.268, abs=1e-3), "v7x-128": pytest.approx(0.386, abs=1e-3)}
    assert UNHIDDEN <= min(open_at_most.values()) < UNHIDDEN + 0.05


def test_a_published_peak_is_held_against_the_same_step_here():
    """What `python -m tests.planning.published --memory` compiles: the model, mesh and length of the page."""
    runs = [run for run in published() if run.peak_gib]
    planned = [run for run in runs if run.offloaded == "inputs"]
    assert (len(runs), len(planned)) == (5, 3)
    for run in planned:
        config = parse_config(parse_args(run.flags), run.devices)
        assert config.mesh_shape == run.mesh and config.execution.remat_block == "offload_inputs"
        assert config.train_dataset.seq_length == run.seq_length and config.train_dataset.batch_size == run.rows
        assert forward_flops(config.architecture, 1, 0) == forward_flops(run.architecture, 1, 0)


def test_every_second_run_of_a_table_is_left_out():
    by_table: dict[str, list[bool]] = {}
    for run in published():
        assert run.source and run.devices >= 1
        by_table.setdefault(run.table, []).append(run.fit)
    assert all(fit == [n % 2 == 0 for n in range(len(fit))] for fit in by_table.values())


def test_shares_are_what_the_fit_makes_of_the_runs():
    assert FILE.read_text() == written(completed(made([run for run in published() if run.fit])))


def test_a_hop_hides_when_its_computation_lasts_as_long():
    """A ring whose bytes take exactly as long as what is computed meanwhile, at the quickest; and twice as many."""
    rate, flops = 1e11, 1e15
    sent = 0.75 * flops / (BEST * PEAK) * rate
    found = bracket(Work([Pass(flops, sent, 0.75)], 0.0, (rate, rate)), V5P, "pallas_tpu", 256)
    assert found.margins == (pytest.approx(1),) and found.exposed == pytest.approx((0, 0), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((flops / (BEST * PEAK), flops / (WORST * PEAK)))
    twice = bracket(Work([Pass(flops, 2 * sent, 0.75)], 0.0, (rate, rate)), V5P, "pallas_tpu", 256)
    longer = 0.75 * flops / (BEST * PEAK)
    assert twice.margins == (pytest.approx(0.5),) and twice.exposed[1] == pytest.approx(longer)
    assert twice.low == pytest.approx(found.low + longer)
    alone = bracket(Work([Pass(flops, 0.0, 1.0, alone=sent)], 0.0, (rate, rate)), V5P, "pallas_tpu", 256)
    assert alone.exposed == pytest.approx((longer, longer)) and alone.margins == (None,)


def test_a_step_is_no_shorter_than_what_it_sends():
    """Three quarters of the other transfers hide at worst, but not behind a computation that is shorter than them."""
    flops, seconds = 1e15, 1e15 / (WORST * PEAK)
    for sent in (seconds, 100 * seconds):
        found = bracket(Work([Pass(flops)], 0.0, others=(sent / 2, sent)), V5P, "pallas_tpu", 256)
        assert found.low == pytest.approx(max(flops / (BEST * PEAK), sent / 2))
        assert found.high == pytest.approx(max(seconds + UNHIDDEN * sent, sent))
    between = bracket(Work([Pass(flops)], 0.0, between=(seconds / 4, seconds)), V5P, "pallas_tpu", 256)
    assert (between.low, between.high) == pytest.approx((flops / (BEST * PEAK), 2 * seconds))
    host = bracket(Work([Pass(flops)], 0.0, meanwhile=100 * seconds * 10e9), V5P, "pallas_tpu", 256)
    assert host.high == pytest.approx(100 * seconds)


def hops(sent: int) -> list[Hop]:
    """Of a ring of 8 in two layers: forward, and keys and their gradients backward."""
    common = {"computation": "body", "in_loop": True, "synchronous": False, "hidden_by": ("kernel",)}
    forward = Hop("f", bytes=sent, times=14, backward=False, **common)
    backward = Hop("b", bytes=sent, times=14, backward=True, **common)
    return [forward, backward]


def test_hops_are_counted_by_time_and_not_by_the_schedule_alone():
    machine = SimpleNamespace(
        links=Links(V5P, 8), devices=range(8), hardware=V5P, platform="tpu", name="v5p-16", slices=1
    )
    config = config_of("--llama.remat_block=save_attention", "--dtype=bf16")
    for sent, hidden in ((1, 28), (2**40, 0)):
        kinds = {"sp": {"collective-permute": 28 * sent}}
        found = estimate(config, machine, kinds, hops(sent), "pallas_tpu", again=False)
        assert (found.hops, found.hidden) == (28, hidden)
        assert (found.bracket.exposed[1] > 0) is (hidden == 0)


def test_half_a_ring_each_way_goes_at_twice_the_rate():
    ring = Links(V5P, 64)
    assert ring.neighbour(1, 8, ways=2)[0] == 2 * ring.neighbour(1, 8)[0] == 2 * V5P.link_gb_per_s * 1e9
    assert ring.neighbour(4, 2)[0] == ring.neighbour(1, 8)[0] / 4  # four devices further on a line


def test_beyond_their_reach_devices_have_a_network():
    host = Links(hardware.find("H100"), 8)
    network = tuple(rate * 1e9 for rate in rates.NETWORK_GB_PER_S)
    assert host.neighbour(1, 16) == network
    assert host.collective(1, 16) == (8 * network[0], 8 * network[1])  # eight adapters a host
    assert host.collective(8, 2) == network
    assert host.collective(1, 8)[0] == 450e9
    assert host.all_to_all(1, 16)[0] == pytest.approx(network[0] / (8 / 15))
    slices = Links(V5P, 64)
    assert slices.collective(64, 2) == (6.25e9, 3.125e9)


@pytest.mark.parametrize(
    ("name", "kernel", "head_dim", "source"),
    [
        ("v7x", "pallas_tpu", 256, "runs of MaxText, long context, Ironwood"),
        ("v5p", "pallas_tpu", 128, "derived"),
        ("v4", "pallas_tpu", 128, "no published run"),
        ("B200", "cudnn", 128, "no published run"),
        ("GB200", "pallas_triton", 64, "no published run"),
        ("H200", "cudnn", 128, "ours, one H200"),
        ("H100", "blockwise", 128, "assumed"),
        ("v3", "blockwise", 128, "assumed"),
    ],
)
def test_every_share_says_where_it_is_from(name, kernel, head_dim, source):
    known = hardware.find(name)
    attention, matmul = rates.attention_share(known, kernel, head_dim), rates.matmul_share(known, kernel)
    assert source in attention.source and matmul.source
    for share in (attention, matmul):
        assert 0 < share.worst < share.best <= 0.9
    assert f"{attention.best:.0%} to {attention.worst:.0%}" == str(attention)


def test_a_small_head_fills_a_tpus_matrix_unit_less():
    known = hardware.find("v6e")
    whole, half = (rates.attention_share(known, "pallas_tpu", size).best for size in (128, 64))
    assert half == whole / 2


def test_the_second_forward_is_charged_where_there_is_one():
    """By the flags; test_account and test_plan hold them to compiled programs."""
    expected = {"": False, "everything_saveable": False, "save_attention": False, "nothing_saveable": True}
    expected |= {"offload_inputs": True, "dots_saveable": True, "checkpoint_dots": True}
    for policy, again in expected.items():
        config = config_of(f"--llama.remat_block={policy}")
        assert attends_again(config) is again, policy
        flops = step_flops(config)
        assert flops.recompute - step_flops(config, again=not again).recompute == pytest.approx(
            flops.attention / 3 * (1 if again else -1)
        )
    assert attends_again(config_of("--llama.remat_attention=nothing_saveable"))


def calls(*names: str) -> str:
    lines = "".join(
        f'  %c{n} = bf16[8]{{0}} custom-call(%x), custom_call_target="k", metadata={{op_name="jit(step)/{name}"}}\n'
        for n, name in enumerate(names)
    )
    return f"HloModule m\nENTRY %main (x: bf16[8]) -> bf16[8] {{\n  %x = bf16[8]{{0}} parameter(0)\n{lines}}}\n"


@pytest.mark.parametrize(
    ("names", "kernel", "again"),
    [
        (("jvp()/attention/ringbpt_attend/pallas_call",), "pallas_tpu", False),
        (("transpose(jvp())/checkpoint/attention/ringbpt_attend_bwd/pallas_call",), "pallas_tpu", False),
        (("transpose(jvp())/rematted_computation/shard_map/attention/ringbpt_attend/p",), "pallas_tpu", True),
        (("jvp()/attention/hopper_forward/m", "jvp()/attention/dot_product_attention_fwd"), "cudnn", False),
        (("jvp()/rematted_computation/feedforward/k", "jvp()/attention/while"), "blockwise", False),
    ],
)
def test_a_programs_names_tell_kernel_and_second_forward(names, kernel, again):
    module = parse(calls(*names))
    assert (kernel_of(module), runs_again(module)) == (kernel, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e-4", "4xh200"])
def test_the_second_forward_is_where_the_flags_say(name):
    """Of compiled programs, dots_saveable among them: it keeps products, of which a kernel is none."""
    machine = compiler(name)
    for policy in ("", "save_attention", "nothing_saveable", "dots_saveable"):
        flags = f"--llama.remat_block={policy}", "--mesh_dim=1,1,1,4", "--dtype=bf16", "--llama.attention_kernel=auto"
        config = config_of(*flags, devices=4)
        assert runs_again(parse(compile_program(config, machine).text)) is attends_again(config), policy


def products(module: Module, computation: Computation, times: int = 1) -> Counter:
    """FLOPs of a CPU program's products by whether they are no attention's, whose in branches have no name."""
    found: Counter = Counter()
    for i in computation.instructions:
        if i.opcode == "dot":
            shapes = i.shape, computation.by_name[i.operands[0]].shape
            made, left = ([int(n) for n in re.findall(r"\d+", re.sub(r"^\w+|\{.*", "", shape))] for shape in shapes)
            summed = re.findall(r"\d+", re.search(r"lhs_contracting_dims=\{([\d,]+)\}", i.attributes)[1])
            found[i.op_name != "" and "/attention/" not in i.op_name] += (
                2 * times * math.prod(made) * math.prod(left[int(dim)] for dim in summed)
            )
        elif i.opcode == "while":
            found += products(module, module.computations[i.attribute("body")], times * (module.trips(i) or 1))
        elif i.opcode in ("call", "conditional", "fusion"):
            for name in i.called:
                found += products(module, module.computations[name], times)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--llama.remat_block=nothing_saveable", "--llama.scan_mlp"),
        ("--llama.remat_block=save_attention", "--llama.scan_mlp=False"),
        ("--llama.remat_block=dots_saveable", "--llama.scan_mlp"),
        ("--llama.remat_block=", "--llama.scan_mlp=False"),
        ("--llama.remat_block=nothing_saveable", "--llama.scan_mlp", "--llama.kv_heads_at_a_time=1"),
    ],
)
def test_arithmetic_is_the_compiled_programs(flags):
    """Every product but attention's, to the last one: what each policy computes again, and what nothing asks for."""
    config = config_of("--mesh_dim=1,1,1,1", "--llama.attention_type=blockwise", *flags, devices=1)
    module = parse(compile_program(config, topology("cpu-1")).text)
    flops, again = step_flops(config), attends_again(config)
    executed = flops.attention * (0.5 / 3 + again / 3)
    dense = flops.model - flops.attention + flops.recompute - executed
    assert products(module, module.entry)[True] == pytest.approx(dense)
