"""The planner: its program is the loop's own, its figures are the compiler's, and its command answers in one line."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt import plan as entry
from ringbpt.config import UserError, parse, parse_args
from ringbpt.generation.generator import Generator
from ringbpt.generation.stream import BatchShape
from ringbpt.mesh import make_mesh
from ringbpt.model.flops import forward_flops
from ringbpt.model.llama import Model
from ringbpt.planning import search
from ringbpt.planning.collectives import collective_bytes, transfers
from ringbpt.planning.estimate import balance, step_flops, visible_pairs
from ringbpt.planning.hlo import parse as parse_hlo
from ringbpt.planning.hlo import shape_bytes
from ringbpt.planning.overlap import products_meanwhile
from ringbpt.planning.program import Program, needed_bytes, read_assignment
from ringbpt.planning.report import Plan, draw, make_plan, suggestion, table
from ringbpt.planning.topologies import topology
from ringbpt.training import loop
from ringbpt.training.memory import account, host_traffic
from tests.pictures import cut_off, drawn
from tests.planning.test_overlap import compiler

SIZES = "--train_dataset.python_dataset.seq_length={}", "--train_dataset.python_dataset.batch_size={}"
MODEL = [
    "--config=tests/recipe.py",
    "--eval_steps=0",
    "--llama.num_hidden_layers=2",
    "--llama.intermediate_size=128",
]
SMALL = [*MODEL, SIZES[0].format(512), SIZES[1].format(4)]


def config_of(*flags: str, devices: int = 8):
    return parse(parse_args([*SMALL, *flags]), devices)


def test_the_planned_program_is_the_one_that_the_loop_runs(tmp_path, monkeypatch):
    """For cpu-8: the same bytes of everything as the program of the real arrays that a run begins with."""
    (tmp_path / "a.py").write_text("pass\n" * 4000)
    source = "--train_dataset.python_dataset"
    run = [f"{source}.path={tmp_path}", f"{source}.split=all", "--total_steps=1", "--nosave_final", "--save_minutes=0"]
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    config = config_of(*run, f"--logger.output_dir={tmp_path}", "--llama.scan_mlp=False")
    seen = []
    make_train_step = loop.make_train_step

    def remembered(*args):
        step = make_train_step(*args)

        def call(state, batch):
            compiled = step.lower(state, batch).compile()
            seen.append(compiled.memory_analysis())
            return compiled(state, batch)

        call.lower = step.lower  # the loop compiles ahead of time
        return call

    monkeypatch.setattr(loop, "make_train_step", remembered)
    loop.train(config)
    planned, ran = make_plan(config, topology("cpu-8")).program, seen[0]
    assert sum(planned.arguments.values()) == ran.argument_size_in_bytes
    # A result that is written over no argument (the metrics) needs a place of its own.
    assert planned.temporaries == ran.temp_size_in_bytes + ran.output_size_in_bytes - ran.alias_size_in_bytes


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 64, constant:
 value: <2 c @0> (size=64,offset=0): f32[16]{0}
allocation 2: size 512, maybe-live-out:
 value: <3 out @0> (size=512,offset=0): f32[128]{0}
allocation 3: size 999, color 3, preallocated-temp:
 value: <4 chip @3> (size=999,offset=0): f32[128]{0}
allocation 4: size 3000, preallocated-temp:
 value: <5 while.1{2} (phi) @0> (size=2000,offset=0): bf16[1000]{0}
 value: <6 inside @0> (size=1000,offset=512): f32[250]{0}
 value: <7 beside @0> (size=1000,offset=2000): f32[250]{0}

Total bytes used: 1
"""


def test_temporaries_are_what_is_neither_argument_nor_constant_nor_on_the_chip():
    total, largest = read_assignment(ASSIGNMENT)
    assert total == 3512
    assert [(buffer.name, buffer.bytes) for buffer in largest][:2] == [("while.1", 2000), ("beside", 1000)]


@pytest.mark.parametrize(
    ("message", "need"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (44.16G) "
            "exceeds available HBM (30.75G).",
            int(44.16 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.79G of 15.75G hbm.", int(16.79 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 1.63M of 1.00M smem.", None),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INTERNAL: Used 16.79G", None),
    ],
)
def test_a_refusal_for_memory_is_read_as_a_figure(message, need):
    assert needed_bytes(message) == need


def test_transfers_are_counted_by_axis_and_by_turn():
    mesh = make_mesh((1, 2, 2, 2))

    def local(x):
        def turn(x, _):
            return jax.lax.ppermute(x, "sp", [(0, 1), (1, 0)]) + jax.lax.psum(x, ("fsdp", "sp")), None

        x, _ = jax.lax.scan(turn, x, length=5)
        return jax.lax.all_gather(x, "tp")

    run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("sp"), out_specs=PartitionSpec(), check_vma=False)
    x = jax.ShapeDtypeStruct((2048,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("sp")))
    text = jax.jit(run).lower(x).compile().as_text()
    assert collective_bytes(parse_hlo(text), (1, 2, 2, 2)) == {
        "sp": {"collective-permute": 5 * 4096},
        "fsdp+sp": {"all-reduce": 5 * 2 * 4096 * 3 // 4},
        "tp": {"all-gather": 4096},
    }


def test_a_product_in_steps_is_counted_as_often_as_it_turns():
    """A TPU's compiler may gather a matrix shard by shard behind its product: unsigned, two shards a turn, no count."""
    body = "%next = u32[] add(%turn, %two)"
    text = """HloModule m, is_scheduled=true
%body (x: (u32[], f32[8])) -> (u32[], f32[8]) {
  %two = u32[]{:T(128)} constant(2)
  %x = (u32[], f32[8]) parameter(0)
  %turn = u32[] get-tuple-element(%x), index=0
  %part = f32[8]{0} get-tuple-element(%x), index=1
  %send = f32[8]{0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}
  %next = u32[] add(%turn, %two)
  ROOT %r = (u32[], f32[8]) tuple(%next, %send)
}
%cond (x: (u32[], f32[8])) -> pred[] {
  %end = u32[]{:T(128)} constant(5)
  %x = (u32[], f32[8]) parameter(0)
  %turn = u32[] get-tuple-element(%x), index=0
  ROOT %less = pred[] compare(%turn, %end), direction=LT
}
ENTRY %main (x: (u32[], f32[8])) -> (u32[], f32[8]) {
  %x = (u32[], f32[8]) parameter(0)
  ROOT %w = (u32[], f32[8]) while(%x), condition=%cond, body=%body
}
"""
    assert body in text and collective_bytes(parse_hlo(text), (1, 1, 1, 2)) == {"sp": {"collective-permute": 3 * 32}}
    every = text.replace(body, "%next = u32[] copy(%turn)")  # added to in a fusion, or elsewhere: one at a time
    assert collective_bytes(parse_hlo(every), (1, 1, 1, 2)) == {"sp": {"collective-permute": 5 * 32}}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "sp"),
        ("[2,4]<=[8]", "tp+sp"),
        ("[4,2]<=[2,4]T(1,0)", "fsdp"),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", "tp"),
        ("mesh['a'=2,'b'=4] {'a','b'}", "fsdp+tp+sp"),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'a','b'}", "tp+sp"),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "fsdp"),
    ],
)
def test_groups_are_read_as_every_compiler_writes_them(groups, axes):
    text = f"""HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert set(collective_bytes(parse_hlo(text), (1, 2, 2, 2))) == {axes}


def test_a_program_of_others_is_read_too():
    """Its mesh's axes have other names, and what a kernel says of itself goes over several lines."""
    text = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %send = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %kernel.7 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/shard_map/kernel/pallas_call"}
  %sent = f32[8]{0} collective-permute-done(%send)
  ROOT %r = f32[8]{0} add(%sent, %kernel.7)
}
"""
    module = parse_hlo(text)
    [sent] = transfers(module, (1, 2, 2), ("data", "context", "tensor"))
    assert (sent.axis, sent.kind, sent.bytes) == ("context", "collective-permute", 32)
    assert sent.computation.by_name["kernel.7"].op_name.endswith("shard_map/kernel/pallas_call")
    assert products_meanwhile(module, sent.computation, sent.instruction) == ("kernel.7",)
    assert products_meanwhile(module, sent.computation, sent.computation.by_name["kernel.7"]) == ()
    assert len(sent.computation.instructions) == 5


def test_shapes_have_bytes():
    assert shape_bytes("(bf16[2,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, pred[3])") == 32 + 4 + 3
    assert shape_bytes("f8e4m3fn[10]{0}") == 10


def test_arithmetic_is_our_own_count():
    config = config_of("--llama.remat_block=nothing_saveable")
    pairs = visible_pairs(config)
    assert pairs == 4 * 512 * 513 / 2
    tokens, architecture = 4 * 512, config.architecture
    flops = step_flops(config)
    assert flops.model == 3 * forward_flops(architecture, tokens, pairs)
    lora = step_flops(config_of("--llama.remat_block=nothing_saveable", "--lora.rank=16"))
    assert lora.model == flops.model - forward_flops(architecture, tokens, 0)
    assert flops.attention == 3 * 4 * pairs * architecture.num_hidden_layers * architecture.hidden_size
    saved = step_flops(config_of("--llama.remat_block=save_attention"))
    assert flops.recompute - saved.recompute == flops.attention / 3
    blocks, kept = (
        step_flops(config_of(f"--llama.remat_block={policy}", "--llama.kv_heads_at_a_time=1"))
        for policy in ("nothing_saveable", "save_attention")
    )
    projected = (
        3 * 2 * tokens * architecture.num_hidden_layers * architecture.hidden_size**2
    )  # queries, keys and values
    assert blocks.recompute - kept.recompute == pytest.approx(flops.attention / 3 + projected)
    windowed = config_of("--llama.sliding_window=8")
    assert visible_pairs(windowed) == 4 * (8 * 9 / 2 + 504 * 8)


def test_the_layout_decides_who_waits():
    assert balance(config_of("--llama.sequence_layout=zigzag")) == pytest.approx(1, abs=0.02)
    assert balance(config_of("--llama.sequence_layout=contiguous")) > 1.8


def test_what_travels_to_the_host_and_back_is_counted():
    """Of a device's share, 1 of 8, in float32: inputs of 2 layers, weights, Adam's moments."""
    config = config_of("--llama.remat_block=nothing_saveable")
    assert host_traffic(config, 4, 512) == (0, 0)
    flags = "--llama.remat_block=offload_inputs", "--optimizer.offload_params", "--optimizer.offload_state"
    held = account(config, 4, 512)
    meanwhile, after = host_traffic(config_of(*flags), 4, 512)
    assert meanwhile == 2 * (2 * 4 * 64 * config.architecture.hidden_size * 4) + 3 * held["params"]
    assert after == 4 * held["params"] + 2 * held["optimizer"]
    meanwhile, _ = host_traffic(config_of(*flags[1:], "--optimizer.accumulate_gradient_steps=2"), 4, 512)
    assert meanwhile == 2 * 6 * held["params"]


# --- the search ---


def fake_plans(monkeypatch, bytes_of):
    """Plans whose memory is bytes_of(config), of a machine with 1000 bytes; returns the configs that were planned."""
    planned = []

    def made(config, machine):
        planned.append(config)
        return Plan(config, machine, SimpleNamespace(total=bytes_of(config), arguments={"parameters": 100}))

    monkeypatch.setattr(search, "make_plan", made)
    return planned


MACHINE = SimpleNamespace(name="fake", platform="tpu", memory=1000, devices=range(8), hardware=None)


@pytest.mark.parametrize("start", [512, 4096, 262144])
def test_the_longest_sequence_is_found_in_few_compiles(start, monkeypatch):
    """Sequences grow in whole chunks of every device: 8 x 64 tokens; the true limit is 65,536."""
    planned = fake_plans(monkeypatch, lambda config: 100 + 900 * config.train_dataset.seq_length // 65536)
    sizes = [SIZES[0].format(start), SIZES[1].format(4), "--llama.max_sequence_length=300000"]
    tree = parse_args([*MODEL, *sizes])
    found = search.find(tree, MACHINE, "seq_length", lambda line: None)
    assert found.fits and 65536 / search.CLOSE <= found.config.train_dataset.seq_length <= 65536
    assert len(planned) <= 6


def test_a_search_may_be_cut_short(monkeypatch):
    planned = fake_plans(monkeypatch, lambda config: 100 + 900 * config.train_dataset.seq_length // 65536)
    tree = parse_args([*MODEL, SIZES[0].format(512), SIZES[1].format(4), "--llama.max_sequence_length=300000"])
    found = search.find(tree, MACHINE, "seq_length", lambda line: None, most_compiles=2)
    assert len(planned) == 2 and found.config is planned[1]


def test_what_never_fits_is_said(monkeypatch):
    fake_plans(monkeypatch, lambda config: 2000)
    with pytest.raises(UserError, match="nothing fits"):
        search.find(parse_args(SMALL), MACHINE, "seq_length", lambda line: None)


def test_the_smallest_sp_that_fits(monkeypatch):
    fake_plans(monkeypatch, lambda config: 4000 // config.mesh_shape[3])
    tree = parse_args([*MODEL, SIZES[0].format(512), SIZES[1].format(8)])
    found = search.find(tree, MACHINE, "sp", lambda line: None)
    assert found.config.mesh_shape == (1, 2, 1, 4)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ([], "--topology is missing"),
        (["--topology=v4-9"], "v4-8 or v4-16"),
        (["--topology=cpu-8", "--find=seq_len"], "did you mean --find=seq_length?"),
        (["--topology=cpu-8", "--find=seq_length"], "plan for a TPU or a GPU"),
        (["--topology=cpu-8", "--json=/no/such/x.json"], "make it first"),
        (["--topology=cpu-8", "--topology=cpu-8"], "twice"),
        (["--topology"], "needs a value"),
        (["--topology=cpu-8", "--mesh_dim=1,1,1,3"], "--mesh_dim"),
    ],
)
def test_mistakes_are_answered_before_any_compile(flags, answer, monkeypatch):
    with pytest.raises(UserError) as error:
        entry.main([*SMALL, *flags])
    assert answer in str(error.value)


def test_a_plan_for_gpus_that_are_not_here(tmp_path, capsys):
    compiler("4xh200")
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    flags = ["--topology=4xh200", f"--json={files[0]}", f"--png={files[1]}", "--dtype=bf16", "--mesh_dim=1,1,1,4"]
    flags += ["--llama.attention_kernel=blockwise", "--llama.scan_mlp=False"]
    assert entry.main([*SMALL, *flags]) == 0
    report = json.loads(files[0].read_text())
    assert report["topology"] == "4xh200" and report["devices"] == 4 and report["fits"] is True
    sizes = report["bytes"]
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"] < sizes["limit"]
    assert sizes["arguments"] == sum(report["arguments"].values())
    assert set(report["collectives"]) == {"sp"} and report["collectives"]["sp"] > 0
    layers, sp = 2, 4  # forward and its rematerialisation n - 1 hops, backward 2 (n - 1), sent in n
    assert report["ring_overlap"]["hops"] >= layers * 3 * (sp - 1)
    assert report["ring_overlap"]["hops"] == sum(report["ring_overlap"][name] for name in ("hidden", "exposed"))
    # 128 tokens a device are too few to hide a hop, whatever the schedule says.
    assert report["ring_overlap"]["hidden"] == 0 and 0 < report["exposed_seconds"][0] <= report["exposed_seconds"][1]
    low, high = report["step_seconds"]
    assert 0 < low < high
    tokens = 4 * 512
    assert report["tokens_per_second"] == pytest.approx([tokens / high, tokens / low])
    assert files[1].read_bytes().startswith(b"\x89PNG") and "run" not in report
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("memory of one device", "largest temporaries", "transfers", "ring", "MFU"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4xh200", "v5e-4"])
def test_what_lives_in_the_hosts_memory_is_no_argument_of_the_device(name):
    """Of a GPU that is not here too, whose abstract devices know no memories."""
    machine = compiler(name)
    # Weights are shared over fsdp as over sp, and no ring need be compiled.
    flags = ["--dtype=bf16", "--mesh_dim=1,4,1,1", "--llama.attention_type=standard", "--llama.scan_mlp=False"]
    here = make_plan(config_of(*flags, devices=4), machine).program
    offload = "--optimizer.offload_params", "--optimizer.offload_state"
    away = make_plan(config_of(*flags, *offload, devices=4), machine).program
    moved = {key: here.arguments[key] - away.arguments[key] for key in here.arguments}
    # What stays are the norms' vectors and a counter or two; Adam's moments are two of each weight.
    assert 0 < away.arguments["parameters"] < 0.05 * here.arguments["parameters"]
    assert moved["optimizer state"] == 2 * moved["parameters"] and moved["batch"] == 0
    # The host has them, and gradients.
    assert here.host == 0 and away.host > 3 * moved["parameters"]


def test_suggestions_are_changes_that_the_model_and_the_mesh_allow(monkeypatch):
    planned = fake_plans(monkeypatch, lambda config: 1)
    flags = [
        flags for flags, _ in search.suggest(parse_args([*SMALL, "--llama.remat_block=nothing_saveable"]), MACHINE)
    ]
    assert "--llama.remat_block=offload_inputs" in flags and "--optimizer.offload_state=True" in flags
    assert "--optimizer.offload_state=True --optimizer.offload_params=True" in flags
    assert "--llama.remat_block=nothing_saveable" not in flags  # it is so already
    assert not any("residual_over_tp" in text for text in flags)  # tp is 1
    assert len(planned) == len(flags) and planned[0].execution.remat_block == "save_attention"
    with_tp = parse_args([*SMALL, "--mesh_dim=1,1,2,4", "--llama.remat_block=nothing_saveable"])
    assert "--llama.residual_over_tp=True" in [flags for flags, _ in search.suggest(with_tp, MACHINE)]


def test_the_picture_is_whole_and_says_of_what(tmp_path, monkeypatch):
    pictures = drawn(monkeypatch)
    program = Program({"parameters": 2**28, "optimizer state": 2**29, "batch": 9}, 2**31, 2**32, 0, [], "")
    for number, config in enumerate((config_of(), replace(config_of(), load_checkpoint="huggingface::models/Some-7B"))):
        report = Plan(config, MACHINE, program).as_dict()
        draw(report, tmp_path / f"{number}.png")
        assert f"model   {report['model']}\n" in table(report)
    for (figure, file), name in zip(pictures, ("debug, 2 layers of 128", "Some-7B, 2 layers of 128"), strict=True):
        title = figure.axes[0].get_title()
        assert title.startswith(f"{name}: 4 x 512 tokens") and "mesh dp,fsdp,tp,sp = 1,1,1,8: 4.00 GiB" in title
        assert cut_off(figure) == [] and len(figure.legends[0].get_texts()) > 6
        assert file.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_a_report_too():
    program = Program({"parameters": 400}, 2**31, 2**31 + 400, 2**30, [], "")
    plan = Plan(config_of(), MACHINE, program)
    assert not plan.fits
    assert " ".join(suggestion("--a=1", plan).split()) == "--a=1 2.00 GiB too much, 1.00 GiB on the host"
    shown = table(plan.as_dict())
    assert "does not fit: 2.00 GiB too much" in shown and "ring" not in shown


def test_a_plan_is_made_twice_with_a_compilation_cache(tmp_path):
    """What the compiler says of its buffers it only says when it compiles."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        machine = topology("cpu-1")
        dumps = []
        for name in ("first", "second"):
            options = {"xla_dump_to": str(tmp_path / name), "xla_dump_hlo_as_text": True}
            x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(machine.devices[0]))
            machine.compile(jax.jit(lambda x: x + 1), x, options=options)
            dumps.append(len(list((tmp_path / name).glob("*buffer-assignment.txt"))))
        assert dumps == [1, 1]
        assert jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_what_samples_is_what_the_engine_holds():
    """Weights and cache of one device, byte for byte, on a mesh that splits both; and they stand beside the state."""
    lengths = [SIZES[0].format(256), SIZES[1].format(2), "--llama.max_sequence_length=512"]
    flags = [*MODEL, *lengths, "--objective=ppo", "--rollout.prompts=x", "--rollout.reward=x.py:y", "--dtype=bf16"]
    flags += ["--rollout.samples_per_prompt=4", "--rollout.max_new_tokens=16", "--rollout.prompts_per_step=6"]
    config = parse(parse_args([*flags, "--mesh_dim=1,2,2,2"]), 8)
    found = make_plan(config, topology("cpu-8"))
    assert found.config.train_dataset.batch_size == 6  # whatever is said of data sets
    sampling = found.sampling
    assert sampling and (sampling.prompt, sampling.rows) == (256 + 1 - 4 * 16, 6)
    model = Model.of(config, make_mesh(config.mesh_shape))
    generator = Generator(model, model.init(jax.random.key(0)))
    stream = generator.stream(BatchShape(6, 256, 4, 16), shared=True)

    def held(tree):
        device = jax.devices()[0]
        return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)

    assert (sampling.weights, sampling.cache) == (held(generator.weights), held(stream._cache))
    kept = sum(found.program.arguments.values()) - found.program.arguments["batch"]
    assert found.sampled == kept + sampling.total and found.total == max(found.program.total, found.sampled)
    assert "while it samples, 6 prompts of 193 tokens" in table(found.as_dict())
    served = make_plan(replace(config, rollout=replace(config.rollout, servers="http://a")), topology("cpu-8"))
    assert served.sampling is None and served.total == served.program.total


def test_rows_without_room_for_a_prompt_are_refused():
    flags = [*SMALL, "--objective=grpo", "--rollout.prompts=x", "--rollout.reward=x.py:y"]
    with pytest.raises(UserError, match=r"does not hold .*samples_per_prompt=8 answers"):
        make_plan(parse(parse_args(flags), 8), topology("cpu-8"))
