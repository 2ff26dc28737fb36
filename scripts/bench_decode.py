"""Time per token of decoding at a long context, beside transformers on torch: same model, same CPU, one run.

    python scripts/bench_decode.py --context=8192

Both decode greedily from the same prompt; the two take turns, and the median time of a token is compared. Before, the
time to the first token is set beside that of the model's forward as training runs it, without the loss.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from ringbpt.config import Flag, printed_help, read_flags, run_main

FLAGS = {
    "context": Flag(int, 8192, "tokens of the prompt", at_least=1, at_most=1 << 30),
    "tokens": Flag(int, 32, "of each turn", at_least=1),
    "turns": Flag(int, 3, "of each of the two", at_least=1),
    "hidden_size": Flag(int, 512, "of the model: 128 or more", at_least=128, at_most=1 << 16),
    "layers": Flag(int, 8, "of the model", at_least=1, at_most=1024),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = SimpleNamespace(**read_flags(argv, FLAGS))
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    from ringbpt.checkpoint.load import load_model
    from ringbpt.generation.generator import Generator, plan_rows
    from ringbpt.generation.sampling import Sampling
    from ringbpt.types import TokenMeta

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=32000, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128, max_position_embeddings=2 * args.context,
        eos_token_id=None, bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(0, 32000, args.context).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        theirs.save_pretrained(folder)
        model, params = load_model(f"huggingface::{Path(folder)}", (1, 1, 1, 1))
    generator = Generator(model, params)
    total = args.tokens * args.turns + 2
    shape, rows = plan_rows([args.context], model, 1, total + 2)
    ours = generator.tokens([prompt], shape, rows, Sampling())
    started = time.perf_counter()
    mine = [next(ours)[0].id, next(ours)[0].id]  # prefill and the compilation of a step
    print(f"ours: prefill and compilation {time.perf_counter() - started:.1f} s", flush=True)
    token_BT, meta = (
        jnp.asarray(prompt[None]),
        TokenMeta(jnp.arange(args.context)[None], jnp.ones((1, args.context), int)),
    )
    forward = jax.jit(model.hidden)
    forward(params, token_BT, meta).block_until_ready()
    whole: dict[str, list[float]] = {"first token": [], "forward": []}
    for _ in range(args.turns):
        for name, once in (
            ("first token", lambda: next(generator.tokens([prompt], shape, rows, Sampling()))),
            ("forward", lambda: forward(params, token_BT, meta).block_until_ready()),
        ):
            started = time.perf_counter()
            once()
            whole[name].append(time.perf_counter() - started)
    with torch.no_grad():
        started = time.perf_counter()
        cache = DynamicCache()
        out = theirs(torch.tensor(prompt[None], dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        print(f"transformers: prefill {time.perf_counter() - started:.1f} s", flush=True)
        token = out.logits[:, -1:].argmax(-1)
        told = [int(token)]

        def step() -> None:
            nonlocal token
            token = theirs(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            told.append(int(token))

        step()
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(args.turns):
            for name, advance in (("ours", lambda: mine.append(next(ours)[0].id)), ("transformers", step)):
                for _ in range(args.tokens):
                    started = time.perf_counter()
                    advance()
                    times[name].append(time.perf_counter() - started)
    same = sum(a == b for a, b in zip(mine, told, strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    versions = f"jax {jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads, float32"
    print(f"{versions}; {args.layers} layers of {args.hidden_size}, context {args.context:,}")
    print(f"the same token {same} of {len(told)} times")
    shown = ", ".join(f"{name} {statistics.median(seconds):.2f} s" for name, seconds in whole.items())
    ratio = statistics.median(whole["first token"]) / statistics.median(whole["forward"])
    print(f"median of a prompt of {args.context:,}: {shown}, ratio {ratio:.2f}")
    shown = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in medians.items())
    print(f"median of a token: {shown}, ratio {medians['ours'] / medians['transformers']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
