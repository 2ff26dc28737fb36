"""What cannot work is refused in one line that names the flags, and what the line proposes does work."""

import re

import pytest

from ringbpt import dims
from ringbpt.config import RUN_FLAGS, UserError, check_value, parse_mesh_dim, values
from ringbpt.training.optimizer import make_optimizer
from tests.test_config import DEBUG, EVAL_SEQ, SEQ, configured, refusal

WHOLE = ["--llama.loss_chunk_size=1024", "--llama.scan_mlp_chunk_size=1024"]  # chunks that fit any length

# --- the mesh ---


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1,-1,1,1", (1, 8, 1, 1)),
        ("2,1,2,2", (2, 1, 2, 2)),
        (" 1, 2 ,-1,2", (1, 2, 2, 2)),
        ("dp:1,fsdp:-1,tp:1,sp:4", (1, 2, 1, 4)),
        ("sp:4,fsdp:2", (1, 2, 1, 4)),
        ("1,1,-1,8", (1, 1, 1, 8)),
    ],
)
def test_mesh(text, shape):
    assert parse_mesh_dim(text, 8) == (shape, False)
    assert parse_mesh_dim("!" + text, 8) == (shape, True)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("0,1,1,8", ("'0' is no size",)),
        ("-2,1,1,8", ("'-2' is no size",)),
        ("-1,-1,1,1", ("more than one -1",)),
        ("1,1,8", ("3 sizes",)),
        ("", ("sizes",)),
        ("a,b", ("2 sizes",)),
        ("1,1,1,x", ("'x' is no size",)),
        ("1,1,1,8.0", ("'8.0' is no size",)),
        ("dp:1,ssp:8", ("'ssp'", "did you mean sp")),
        ("sp:1,sp:8", ("'sp' twice",)),
        ("1,1,1,16", ("16 devices", "there are 8", "'1,1,1,8'", "--num_cpu_devices=16")),
        ("1,1,4,64", ("256 devices", "'1,1,4,2'")),
        ("1,3,1,-1", ("a multiple of 3", "there are 8")),
        ("1,1,1,4", ("4 devices", "'1,1,1,8'")),
    ],
)
def test_mesh_mistakes(text, fragments):
    message = refusal(f"--mesh_dim={text}")
    assert message.startswith(f"--mesh_dim='{text}'")
    for fragment in fragments:
        assert fragment in message


def test_nearest_mesh_fits():
    for text in ("3,5,7,2", "1,64,4,1", "-1,3,1,1", "9,9,9,9", "1,1,1,4", "1,1,16,1"):
        for devices in (1, 2, 8, 40):
            with pytest.raises(UserError) as caught:
                parse_mesh_dim(text, devices)
            fits = re.search(r"--mesh_dim='([^']*)' fits", str(caught.value))[1]
            assert parse_mesh_dim(fits, devices)


def test_axes_are_the_alphabets():
    assert values.AXES == dims.AXES


# --- values that do not go together: the message names both, and what it proposes works ---

BATCH = "--train_dataset.python_dataset.batch_size"
EVAL_BATCH = "--eval_dataset.python_dataset.batch_size"
ADAMW = "--optimizer.adamw_optimizer."

# (flags after the debug recipe, what the message names, proposals: each is in the message and, given instead, works)
PAIRS = [
    ([f"{SEQ}=500"], ["sp=8"], [f"{SEQ}=496", f"{SEQ}=504"]),
    ([f"{SEQ}=264", "--llama.sequence_layout=zigzag"], ["2*sp=16"], [f"{SEQ}=256", f"{SEQ}=272"]),
    ([f"{EVAL_SEQ}=500"], ["sp=8"], [f"{EVAL_SEQ}=496", f"{EVAL_SEQ}=504"]),
    ([f"{SEQ}=2048"], ["--llama.max_sequence_length=1024"], [f"{SEQ}=1024", "--llama.max_sequence_length=2048"]),
    (["--llama.max_sequence_length=256"], [f"{SEQ}=512"], ["--llama.max_sequence_length=512"]),
    ([f"{SEQ}=1024", "--llama.loss_chunk_size=48"], ["128 tokens", SEQ, "sp=8"], ["--llama.loss_chunk_size=32"]),
    ([f"{SEQ}=1024", "--llama.scan_mlp_chunk_size=48"], ["128 tokens"], ["--llama.scan_mlp_chunk_size=64"]),
    ([f"{EVAL_SEQ}=1024", "--llama.loss_chunk_size=100"], [EVAL_SEQ], ["--llama.loss_chunk_size=128"]),
    (["--llama.hidden_size=132", "--llama.head_dim=32"], ["fsdp*sp=1*8"], ["sp=6"]),
    (["--llama.hidden_size=130"], ["--llama.num_attention_heads=4"], ["--llama.hidden_size=128"]),
    (["--llama.attention_type=blockwise"], ["sp=8"], ["--llama.attention_type=ring_blockwise"]),
    (["--llama.num_key_value_heads=3"], ["heads=4"], [f"--llama.num_key_value_heads={n}" for n in (2, 4)]),
    (["--llama.head_dim=33"], ["odd"], ["--llama.head_dim=32", "--llama.head_dim=34"]),
    (["--llama.num_attention_heads=128"], ["--llama.head_dim=1"], ["--llama.head_dim=2"]),
    (["--mesh_dim=1,1,8,1"], ["num_attention_heads=4", "tp=8", "tp=4"], ["--llama.num_attention_heads=8"]),
    (["--mesh_dim=1,2,4,1", "--llama.num_key_value_heads=2"], ["tp=4", "tp=2"], ["--llama.num_key_value_heads=4"]),
    (["--mesh_dim=1,2,4,1", "--llama.intermediate_size=254"], ["tp=2"], ["--llama.intermediate_size=252"]),
    (["--llama.heads_k_stride=2"], ["sequence_parallel=ring"], ["--llama.sequence_parallel=all_gather"]),
    (["--llama.ulysses_degree=4"], ["sp=8"], ["--llama.sequence_parallel=ulysses_ring"]),
    (["--llama.sequence_parallel=ulysses"], ["4 query and 4 key/value heads"], ["--llama.sequence_parallel=ring"]),
    (
        ["--mesh_dim=1,2,2,2", "--llama.sequence_parallel=all_gather", "--llama.heads_k_stride=3"],
        ["2 key/value heads"],
        ["--llama.heads_k_stride=2"],
    ),
    (
        ["--mesh_dim=1,2,2,2", "--llama.kv_heads_at_a_time=3"],
        ["2 key/value heads"],
        ["--llama.kv_heads_at_a_time=2"],
    ),
    (
        ["--mesh_dim=1,2,2,2", "--llama.kv_heads_at_a_time=1", "--llama.sequence_parallel=ulysses"],
        ["not go with --llama.sequence_parallel=ulysses"],
        ["--llama.sequence_parallel=ring"],
    ),
    (
        ["--mesh_dim=1,2,2,2", "--llama.sequence_parallel=all_gather", "--llama.ring_bidirectional"],
        ["not for --llama.sequence_parallel=all_gather"],
        ["--llama.sequence_parallel=ring"],
    ),
    (
        [f"{SEQ}=1000", "--llama.ring_bidirectional", "--llama.sequence_layout=contiguous", *WHOLE],
        ["125 tokens of a device"],
        [f"{SEQ}=992", f"{SEQ}=1008"],
    ),
    (["--mesh_dim=2,2,1,2", f"{BATCH}=6"], ["dp*fsdp=2*2"], [f"{BATCH}=4", f"{BATCH}=8"]),
    (["--mesh_dim=2,2,1,2", f"{EVAL_BATCH}=6"], ["dp*fsdp=2*2"], [f"{EVAL_BATCH}=4", f"{EVAL_BATCH}=8"]),
    (["--optimizer.accumulate_gradient_steps=5"], ["accumulate_gradient_steps=5"], [f"{BATCH}=30", f"{BATCH}=35"]),
    ([f"{ADAMW}lr_warmup_steps=600"], [f"{ADAMW}lr_decay_steps=500"], [f"{ADAMW}lr_warmup_steps=499"]),
    ([f"{ADAMW}lr_decay_steps=50"], [f"{ADAMW}lr_warmup_steps=50"], [f"{ADAMW}lr_decay_steps=51"]),
    (
        ["--optimizer.schedule=wsd", f"{ADAMW}lr_warmup_steps=600"],
        [f"{ADAMW}lr_decay_steps=500"],
        [f"{ADAMW}lr_warmup_steps=500", f"{ADAMW}lr_decay_steps=600"],
    ),
    (["--optimizer.type=palm", "--optimizer.schedule=wsd"], ["--optimizer.schedule=wsd"], ["--optimizer.type=adamw"]),
    (
        ["--llama.rope_scaling_type=llama3", "--llama.rope_scaling_low_freq_factor=4"],
        ["--llama.rope_scaling_high_freq_factor=4.0"],
        [],
    ),
    (["--eval_dataset.type=json"], ["--eval_steps=100", "--eval_dataset.json_dataset.path"], ["--eval_steps=0"]),
]


@pytest.mark.parametrize(("argv", "names", "proposals"), PAIRS, ids=lambda part: " ".join(part) or "-")
def test_pairs(argv, names, proposals):
    message = refusal(DEBUG, *argv)
    assert message.startswith("--")
    for fragment in names + proposals:
        assert fragment in message
    for proposal in proposals:
        if not proposal.startswith("--"):
            continue
        kept = [flag for flag in argv if flag.split("=")[0] != proposal.split("=")[0]]
        configured(DEBUG, *kept, proposal)


def test_sp_3_is_refused_with_what_works():
    message = refusal(DEBUG, "--mesh_dim=1,1,1,3", f"{SEQ}=576", f"{EVAL_SEQ}=576", devices=3)
    assert "--llama.hidden_size=128" in message and "sp=2 or sp=4" in message
    config = configured(
        DEBUG,
        "--mesh_dim=1,1,1,3",
        "--update_llama_config=dict(hidden_size=96)",
        f"{SEQ}=576",
        "--eval_steps=0",
        devices=3,
    )
    assert config.mesh_shape == (1, 1, 1, 3)


def test_nearest_split_of_the_weights():
    assert "fsdp=4" in refusal(DEBUG, "--mesh_dim=1,6,1,1", devices=6)
    assert "a product fsdp*sp=8 or a product fsdp*sp=16" in refusal(DEBUG, "--mesh_dim=1,3,1,3", devices=9)


# (name, value, what the message proposes)
SINGLES = [
    ("dtype", "bf15", "--dtype='bf16'"),
    ("objective", "dop", "--objective='dpo'"),
    ("checkpointer.float_dtype", "int8", "none of"),
    ("llama.attention_type", "ring", "--llama.attention_type='ring_"),
    ("llama.sequence_layout", "zig-zag", "'zigzag'"),
    ("llama.rope_scaling_type", "llama", "'llama3'"),
    ("llama.remat_block", "nothing_savable", "'nothing_saveable'"),
    ("llama.remat_attention", "full", "none of"),
    ("llama.remat_mlp", "dots", "none of"),
    ("optimizer.type", "adam", "'adamw'"),
    ("optimizer.schedule", "cosine", "'warmup_cosine'"),
    ("train_dataset.type", "jsonl", "'json'"),
    ("train_dataset.long_documents", "cut", "none of"),
    ("train_dataset.text_processor.shape", "message", "'messages'"),
    ("eval_dataset.text_processor.train_on_eos", "never", "none of"),
    ("eval_dataset.packing", "firstfit", "'first_fit'"),
    ("train_dataset.python_dataset.split", "test", "none of"),
    ("seed", "-1", "--seed=0"),
    ("seed", str(2**32), f"--seed={2**32 - 1}"),
    ("total_steps", "0", "--total_steps=1"),
    ("log_freq", "0", "--log_freq=1"),
    ("eval_steps", "-1", "--eval_steps=0"),
    ("eval_batches", "0", "--eval_batches=1"),
    ("save_model_freq", "-5", "--save_model_freq=0"),
    ("save_milestone_freq", "-5", "--save_milestone_freq=0"),
    ("num_cpu_devices", "-1", "--num_cpu_devices=0"),
    ("optimizer.accumulate_gradient_steps", "0", "=1"),
    ("optimizer.wsd_decay_fraction", "0", "=0.1"),
    ("optimizer.wsd_decay_fraction", "1.5", "=1"),
    ("optimizer.adamw_optimizer.lr", "nan", "=0.0003"),
    ("optimizer.adamw_optimizer.lr", "-1e-4", "=0"),
    ("optimizer.adamw_optimizer.lr", "inf", "=0.0003"),
    ("optimizer.adamw_optimizer.weight_decay", "-0.1", "=0"),
    ("optimizer.adamw_optimizer.weight_decay", "nan", "=0.0001"),
    ("optimizer.adamw_optimizer.b1", "1", "0.9"),
    ("optimizer.adamw_optimizer.clip_gradient", "-1", "=0"),
    ("optimizer.adamw_optimizer.lr_warmup_steps", "-1", "=0"),
    ("llama.num_attention_heads", "0", "=1"),
    ("llama.num_key_value_heads", "0", "=1"),
    ("llama.vocab_size", "-1", "=1"),
    ("llama.rms_norm_eps", "0", "=1e-06"),
    ("llama.attn_pdrop", "0.1", "dropout is not supported"),
    ("llama.resid_pdrop", "0.1", "dropout is not supported"),
    ("llama.embd_pdrop", "0.1", "dropout is not supported"),
    ("llama.param_scan_axis", "2", "=1"),
    ("llama.scan_query_chunk_size", "0", "=1"),
    ("llama.scan_key_chunk_size", "-1", "=1"),
    ("llama.heads_k_stride", "0", "=1"),
    ("llama.kv_heads_at_a_time", "0", "=1"),
    ("train_dataset.python_dataset.batch_size", "0", "=1"),
    ("eval_dataset.python_dataset.seq_length", "0", "=1"),
    ("load_checkpoint", "/a/b", "--load_checkpoint='params::/a/b'"),
    ("load_checkpoint", "param::/a/b", "'params::/a/b'"),
    ("load_checkpoint", "params::", "no path"),
    ("logger.experiment_id", "../../x", "--logger.experiment_id=x"),
    ("logger.experiment_id", "/etc", "--logger.experiment_id=etc"),
    ("logger.experiment_id", "..", "--logger.experiment_id=run"),
    ("logger.experiment_id", "-x", "--logger.experiment_id=x"),
    ("jax_distributed.num_processes", "0", "=1"),
    ("jax_distributed.process_id", "-1", "=0"),
]


@pytest.mark.parametrize(("name", "value", "proposal"), SINGLES)
def test_single_values(name, value, proposal):
    message = refusal(DEBUG, f"--{name}={value}")
    assert message.startswith(f"--{name}=")
    assert proposal in message.split("=", 1)[1]


def test_process_id_within_the_processes():
    argv = [DEBUG, "--jax_distributed.num_processes=2"]
    assert "from 0 to 1" in refusal(*argv, "--jax_distributed.process_id=2")
    assert configured(*argv, "--jax_distributed.process_id=1").jax_distributed.process_id == 1


def test_optimizers_own_conditions():
    assert "lr_warmup_steps=1" in refusal(
        DEBUG, "--optimizer.type=palm", "--optimizer.palm_optimizer.lr_warmup_steps=0"
    )
    assert "above 0" in refusal(DEBUG, "--optimizer.type=muon", "--optimizer.muon_optimizer.lr=0")
    for kind in ("adamw", "palm", "lion", "muon"):  # an optimizer that is not chosen may hold anything finite
        assert configured(DEBUG, f"--optimizer.type={kind}", "--eval_steps=0").optimizer.type == kind
    assert configured(DEBUG, "--optimizer.lion_optimizer.lr=-1").optimizer.type == "adamw"


@pytest.mark.parametrize(
    ("flag", "fix"),
    [
        ("--llama.remat_block=everything_saveable", "--llama.remat_block=nothing_saveable"),
        ("--llama.gathered_weights=keep", "--llama.gathered_weights=again"),
        ("--llama.param_scan_axis=1", "--llama.param_scan_axis=0"),
        ("--llama.scan_layers=False", "--llama.scan_layers=True"),
        ("--optimizer.type=palm", "--optimizer.type=adamw, lion or muon"),
        ("--optimizer.adamw_optimizer.multiply_by_parameter_scale", "--optimizer.type=adamw, lion or muon"),
    ],
)
def test_what_weights_in_the_hosts_memory_do_not_go_with(flag, fix):
    argv = [DEBUG, "--optimizer.offload_params", "--llama.remat_block=nothing_saveable"]
    assert configured(*argv).optimizer.offload_params
    name, kept = flag.partition("=")[0], [word for word in argv if not word.startswith(flag.partition("=")[0])]
    message = refusal(*kept, flag)
    assert message.startswith("--optimizer.offload_params") and name.rpartition(".")[2] in message
    assert fix in message


@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_linear", "wsd"])
def test_the_longest_warmup_that_is_allowed_builds(schedule):
    longest = 499 if schedule == "warmup_cosine" else 500
    argv = [DEBUG, f"--optimizer.schedule={schedule}", f"{ADAMW}lr_warmup_steps="]
    refusal(*argv[:-1], f"{argv[-1]}{longest + 1}")
    _, rate = make_optimizer(configured(*argv[:-1], f"{argv[-1]}{longest}").optimizer)
    assert float(rate(longest)) > 0


def test_what_must_be_accepted():
    config = configured(
        DEBUG,
        "--llama.scan_query_chunk_size=100",  # any attention chunk works
        "--llama.loss_chunk_size=1000",  # at least the local length: one chunk
        "--llama.scan_mlp=False",
        "--llama.scan_mlp_chunk_size=7",  # not used
        "--dtype=float32",
        "--checkpointer.float_dtype=bfloat16",
        "--load_checkpoint=params::/a::b",
        "--autoresume",
        "--logger.experiment_id=run_7b.v2",
        "--llama.remat_mlp=save_attention",
    )
    assert (config.dtype, config.checkpointer.float_dtype) == ("fp32", "bf16")
    assert configured(DEBUG, "--eval_steps=0", f"{EVAL_BATCH}=7", f"{EVAL_SEQ}=7", "--mesh_dim=2,1,1,4").eval_steps == 0
    assert configured(DEBUG, "--llama.attention_type=standard", "--mesh_dim=1,8,1,1").mesh_shape == (1, 8, 1, 1)


@pytest.mark.parametrize("value", ["0", "-7", "x:y,z"])
def test_no_value_of_any_flag_is_a_crash(value):
    for name in RUN_FLAGS:
        try:
            configured(DEBUG, f"--{name}={value}")
        except UserError as error:
            assert name in str(error) or name.rpartition(".")[2] in str(error)


def test_defaults_obey_their_own_rules():
    for name, flag in RUN_FLAGS.items():
        check_value(name, flag, flag.default)
    assert sum(bool(flag.choices) for flag in RUN_FLAGS.values()) > 20
    assert {
        rule
        for flag in RUN_FLAGS.values()
        for rule in ("at_least", "above", "at_most", "below")
        if getattr(flag, rule) is not None
    } == {"at_least", "above", "at_most", "below"}
