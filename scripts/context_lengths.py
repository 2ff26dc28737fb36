"""docs/context_lengths.md: the longest sequence that fits, by compiling ahead of time, beside what others published.

    python scripts/context_lengths.py

Every row that is computed is kept in docs/context_lengths.json, so that a run can be stopped and gone on with; the
page is written from that file.
"""

import json
import sys
from pathlib import Path

import jax

from ringbpt.config import Flag, parse_args, printed_help, read_flags, run_main
from ringbpt.planning.overlap import counted, ring_hops
from ringbpt.planning.report import size
from ringbpt.planning.search import find
from ringbpt.planning.topologies import topology

FLAGS = {
    "only": Flag(str, "", "rows whose name contains this text"),
    "times": Flag(float, 1.0, "a row begins at so many times their length", above=0),
    "close": Flag(float, 1.25, "how close to the limit a row ends", above=1),
    "most": Flag(int, 3, "after how many compiles it ends", at_least=1),
}
DOCS = Path(__file__).parents[1] / "docs"
K = 1024
LLAMA8, LLAMA70 = (4096, 14336, 32, 32, 8, 128256), (8192, 28672, 80, 64, 8, 128256)
LLAMA7 = (4096, 11008, 32, 32, 32, 32000)
WIDE8 = (4096, 14336, 32, 16, 4, 128256, 256)  # the last: numbers of a head
QWEN7, QWEN14, QWEN72 = (
    (3584, 18944, 28, 28, 4, 152064),
    (5120, 13824, 48, 40, 8, 152064),
    (8192, 29568, 80, 64, 8, 152064),
)
QWEN32 = (5120, 25600, 64, 64, 8, 151936, 128)
KEPT, AWAY = "--llama.remat_block=nothing_saveable", "--llama.remat_block=offload_inputs"
BLOCKS, OVER_TP, STATE = "--llama.kv_heads_at_a_time=1", "--llama.residual_over_tp", "--optimizer.offload_state"
FP32, BF16 = ("--dtype=fp32", KEPT, BLOCKS), ("--dtype=bf16", KEPT)
OFFLOAD = ("--dtype=bf16", AWAY, STATE)
DPO = ("--objective=dpo", "--train_dataset.share_prompts=False")  # a pair of answers in a row, each half as long
PARAMS, QK_NORM = "--optimizer.offload_params", "--llama.qk_norm"
# Pairs beside every matrix of a layer, of the rank of those that were published.
LORA = ("--dtype=bf16", AWAY, BLOCKS, "--lora.rank=32", "--lora.base_dtype=bf16")
QLORA = (*LORA[:-1], "--lora.base_dtype=nf4", "--lora.double_quantization")
ACTIVATIONS = ("--dtype=bf16", AWAY, BLOCKS)  # nothing else is in the host's memory
RING, ALST, LF, UNSLOTH, NOBODY = "Ring Attention", "ALST", "360-LLaMA-Factory", "Unsloth", "-"
UNTIED, MAXTEXT = "Untied Ulysses", "MaxText"

BEGIN = 1024 * K  # where a row begins of which nothing is published
# source, their hardware, model (a preset or sizes), their maximum in tokens or None, topology, mesh, flags.
ROWS = [
    (RING, "8 A100-80", "3b", 512 * K, "8xa100-80g", "1,1,1,8", ("--dtype=fp32", KEPT)),
    (RING, "8 A100-80", "7b", 256 * K, "8xa100-80g", "1,1,1,8", FP32),
    (RING, "8 A100-80", "13b", 128 * K, "8xa100-80g", "1,1,1,8", FP32),
    (RING, "32 A100-80", "7b", 4096 * K, "4x8xa100-80g", "1,1,1,32", ("--dtype=fp32", AWAY, BLOCKS)),
    (RING, "32 A100-80", "13b", 2048 * K, "4x8xa100-80g", "1,1,1,32", FP32),
    (ALST, "1 H200", ("Llama-3-8B", LLAMA8), 1_200_000, "h200", "1,1,1,1", (*OFFLOAD, PARAMS, BLOCKS)),
    (ALST, "1 H100-80", ("Llama-3-8B", LLAMA8), 500_000, "h100-80g", "1,1,1,1", (*OFFLOAD, PARAMS, BLOCKS)),
    (ALST, "8 H100-80", ("Llama-3-8B", LLAMA8), 3_700_000, "8xh100-80g", "1,1,1,8", (*OFFLOAD, PARAMS, BLOCKS)),
    (ALST, "32 H100-80", ("Llama-3-8B", LLAMA8), 15_000_000, "4x8xh100-80g", "1,1,1,32", (*OFFLOAD, BLOCKS)),
    (UNTIED, "8 H100-80", ("Llama-3-8B", LLAMA8), 5_000_000, "8xh100-80g", "1,1,1,8", ACTIVATIONS),
    (UNTIED, "16 H100-80", ("Llama-3-8B", LLAMA8), 8_000_000, "2x8xh100-80g", "1,1,1,16", ACTIVATIONS),
    (UNTIED, "16 H100-80", ("Qwen3-32B", QWEN32), 4_000_000, "2x8xh100-80g", "1,1,1,16", (*ACTIVATIONS, QK_NORM)),
    (LF, "8 A800", ("Qwen2.5-7B", QWEN7), 210_000, "8xa100-80g", "1,1,1,8", BF16),
    (LF, "8 A800", ("Qwen2.5-14B", QWEN14), 175_000, "8xa100-80g", "1,1,1,8", BF16),
    (LF, "8 A100-80", ("Qwen2.5-7B DPO", QWEN7), 168_000, "8xa100-80g", "1,1,1,8", (*BF16, *DPO)),
    (LF, "8 A100-80", ("Qwen2.5-14B DPO", QWEN14), 144_000, "8xa100-80g", "1,1,1,8", (*BF16, BLOCKS, *DPO)),
    (LF, "32 A800", ("Qwen2.5-72B", QWEN72), 128_000, "4x8xa100-80g", "1,1,1,32", OFFLOAD),
    (UNSLOTH, "1 RTX 4090", ("Llama-3.1-8B QLoRA", LLAMA8), 78_475, "rtx4090", "1,1,1,1", QLORA),
    (UNSLOTH, "1 H100-80", ("Llama-3.1-8B QLoRA", LLAMA8), 342_733, "h100-80g", "1,1,1,1", QLORA),
    (UNSLOTH, "1 H100-80", ("Llama-3.3-70B QLoRA", LLAMA70), 89_389, "h100-80g", "1,1,1,1", QLORA),
    (NOBODY, "1 H100-80", ("Llama-3.1-8B LoRA", LLAMA8), None, "h100-80g", "1,1,1,1", LORA),
    (NOBODY, "8 H100-80", ("Llama-3.1-8B LoRA", LLAMA8), None, "8xh100-80g", "1,1,1,8", LORA),
    (NOBODY, "8 H100-80", ("Llama-3.1-8B QLoRA", LLAMA8), None, "8xh100-80g", "1,1,1,8", QLORA),
    (NOBODY, "8 H100-80", ("Llama-3.3-70B LoRA", LLAMA70), None, "8xh100-80g", "1,1,1,8", LORA),
    (NOBODY, "8 H100-80", ("Llama-3.3-70B QLoRA", LLAMA70), None, "8xh100-80g", "1,1,1,8", QLORA),
    (RING, "TPU v3-512", "7b", 2048 * K, "v3-512", "!1,1,4,128", (*FP32, OVER_TP)),
    (RING, "TPU v4-1024", "3b", 16384 * K, "v4-1024", "1,1,8,64", (*FP32, OVER_TP)),
    (RING, "TPU v4-1024", "7b", 8192 * K, "v4-1024", "1,1,8,64", (*FP32, OVER_TP)),
    (RING, "TPU v4-1024", "13b", 4096 * K, "v4-1024", "1,1,8,64", (*FP32, OVER_TP)),
    (RING, "TPU v4-1024", "30b", 2048 * K, "v4-1024", "!1,1,4,128", (*FP32, OVER_TP)),
    (NOBODY, "TPU v4-512", ("7b, all on the device", LLAMA7), None, "v4-512", "1,1,4,64", (*BF16, BLOCKS, OVER_TP)),
    (NOBODY, "TPU v4-512", ("7b, offloaded", LLAMA7), None, "v4-512", "1,1,4,64", (*ACTIVATIONS, OVER_TP)),
    (MAXTEXT, "TPU v5p-128", ("8B of 16/4 heads of 256", WIDE8), 14 * K * K, "v5p-128", "1,1,1,64", ACTIVATIONS),
    (RING, "TPU v5e-256", "3b", 4096 * K, "v5e-256", "1,1,4,64", (*FP32, OVER_TP)),
    (RING, "TPU v5e-256", "7b", 2048 * K, "v5e-256", "1,1,4,64", (*FP32, OVER_TP)),
]  # fmt: skip


def flags_of(model, theirs: int, mesh: str, flags: tuple[str, ...]) -> list[str]:
    sp = int(mesh.rpartition(",")[2])
    start = -(-theirs // (sp * K)) * sp * K
    common = ["--llama.attention_type=ring_blockwise", "--llama.scan_mlp", "--train_dataset.json_dataset.batch_size=1"]
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
    if isinstance(model, str):
        sizes = [f"--load_llama_config={model}"]
    else:
        sizes = [f"--llama.{name}={value}" for name, value in zip(names, model[1], strict=False)]
    lengths = [f"--train_dataset.json_dataset.seq_length={start}", f"--llama.max_sequence_length={start}"]
    return [*common, *sizes, *lengths, *flags, f"--mesh_dim={mesh}"]


def write_page(known: dict) -> None:
    lines = [
        "# How long a sequence fits",
        "",
        "The longest single sequence whose train step compiles ahead of time within the device's memory, beside what",
        "others published for the same model and hardware. Theirs were run; ours were compiled, not run. All weights",
        "are trained (AdamW, float32 weights and state) except by LoRA: pairs of rank 32 beside every matrix of a",
        "layer, over a base in bfloat16; and QLoRA: the same over a base in nf4 with double quantization. Written by",
        f"`python scripts/context_lengths.py`, which says how each row is asked for (jax {jax.__version__}). Ours are",
        "lengths that fit, not the longest: a row begins at their length, or near what fits, and ends after one to",
        "three compiles. A GPU's program may use 95 % of its memory. Host is of each device: a node of 8 needs 8 times",
        "that. DPO: a row is a pair, each answer with its prompt half as long; what the reference says is a column, so",
        "one model is in memory. Unsloth's are from its README: QLoRA of rank 32, one row; 70B on an A100 of 80 GB.",
        "LoRA of 70B fits no single H100-80: its base is 131 GiB in bfloat16, and a base is not offloaded. Hops: of a",
        "ring, in a step; hidden: scheduled behind attention. v3's compiler sends nothing in the background.",
        "",
        "| source | hardware | model | theirs | ours | of one device | host | hops hidden | mesh | with |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    missing = []
    for source, hardware, model, longest, *_, mesh, flags in ROWS:
        label, theirs = model if isinstance(model, str) else model[0], f"{longest:,}" if longest else "-"
        name = f"{source} {hardware} {label}"
        row = known.get(name)
        if row is None:
            missing.append(f"{source}: {label} on {hardware} ({theirs})")
        elif "refused" in row:
            missing.append(f"{source}: {label} on {hardware} ({theirs}): {row['refused']}")
        else:
            asked = ", ".join(flag.rpartition(".")[2].removeprefix("--").replace("remat_block=", "") for flag in flags)
            memory = f"{size(row['total'])} of {size(row['limit'])}"
            host = size(row["host"]) if row["host"] else ""
            hops = f"{row['hidden']:,} of {row['hops']:,}" if row["hops"] else ""
            cells = (source, hardware, label, theirs, f"{row['ours']:,}", memory, host, hops, mesh, asked)
            lines.append(f"| {' | '.join(cells)} |")
    if missing:
        lines += ["", "Not compiled yet, or not possible:", "", *(f"- {line}" for line in missing)]
    (DOCS / "context_lengths.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own = read_flags(argv, FLAGS)
    file = DOCS / "context_lengths.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    jax.config.update("jax_platforms", "cpu")
    for source, hardware, model, theirs, machine, mesh, flags in ROWS:
        name = f"{source} {hardware} {model if isinstance(model, str) else model[0]}"
        if name in known or own["only"] not in name:
            continue
        print(name, flush=True)
        try:
            say = lambda line: print(f"  {line}", flush=True)  # noqa: E731
            tree = parse_args(flags_of(model, round((theirs or BEGIN) * own["times"]), mesh, flags))
            plan = find(tree, topology(machine), "seq_length", say, own["close"], own["most"])
            program, ours = plan.program, plan.config.train_dataset.seq_length
            known[name] = {"ours": ours, "total": program.total, "limit": plan.machine.memory, "host": program.host}
            known[name] |= counted(ring_hops(program.module or program.text))
        except Exception as error:  # a compiler that gives up is an answer too
            known[name] = {"refused": " ".join(str(error).split())[:200]}
        file.write_text(json.dumps(known, indent=1) + "\n")
    write_page(known)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
