"""The length of the schedule that libtpu makes of one block in each TPU kernel, ours and splash attention's.

One bundle is what a core issues in a cycle, but for stalls: no measurement, and the nearest to one without a TPU.

python scripts/tpu_bundles.py [--topology=v5e-4] [--block=512]
"""

import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

dump = tempfile.mkdtemp()
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
os.environ["JAX_PLATFORMS"] = "cpu"

# The compiler reads its flags when it is loaded.
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from ringbpt.attention.core import MaskSpec  # noqa: E402
from ringbpt.attention.local.pallas_tpu import make_pallas_tpu  # noqa: E402
from ringbpt.config import Flag, printed_help, read_flags, run_main  # noqa: E402
from ringbpt.planning.topologies import topology  # noqa: E402
from ringbpt.types import TokenMeta  # noqa: E402

FLAGS = {
    "topology": Flag(str, "v5e-4", "a TPU, which need not be here"),
    "block": Flag(int, 512, "queries and keys of a block", at_least=128, at_most=4096),
}
T, N, K, H = 4096, 8, 2, 128


def stretches(file: Path) -> list[int]:
    """The lengths of what runs without a branch, the longest first."""
    lengths, length = [], 0
    for line in file.read_text().splitlines():
        if re.match(r"\s*0x[0-9a-f]+|\s*0\s", line):
            length += 1
            if "sbr.rel" in line or re.match(r"\s*0x[0-9a-f]+ (PF|LB|LH|PB|CT):", line):
                lengths.append(length)
                length = 0
    return sorted([*lengths, length], reverse=True)


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    name, size = read_flags(argv, FLAGS).values()
    machine = topology(name)
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(machine.devices[0]))
    q, k = (array((1, T, n, H), jnp.bfloat16) for n in (N, K))
    meta, out, lse = array((1, T), jnp.int32), array(q.shape, jnp.float32), array((1, T, N), jnp.float32)
    local = make_pallas_tpu(machine.devices[0], size, size)
    metas = (TokenMeta(meta, meta),) * 2
    machine.compile(jax.jit(lambda *args: local.attend(*args, MaskSpec())), q, k, k, *metas)
    machine.compile(jax.jit(lambda *args: local.attend_bwd(*args, MaskSpec())), q, k, k, out, lse, q, *metas)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((T, T))] * N)
    theirs = splash.make_splash_mha_single_device(
        mask, block_sizes=splash.BlockSizes(**dict.fromkeys(names.split(), size))
    )

    def total(q, k, v, segment):
        heads = (x[0].swapaxes(0, 1) for x in (q, k, v))
        return jnp.sum(theirs(*heads, splash.SegmentIds(segment, segment)).astype(jnp.float32) ** 2)

    machine.compile(jax.jit(jax.grad(total, (0, 1, 2))), q, k, k, array((T,), jnp.int32))
    print(f"{name}, jax {jax.__version__}, head dim {H}, bfloat16: bundles for {size} queries x {size} keys")
    for file in sorted(Path(dump).glob("*[0-9]-final_bundles.txt")):
        kernel = re.search(r"ringbpt_attend(_bwd)?|splash_mha_[a-z]+", file.name)
        if kernel:
            print(kernel[0], stretches(file)[: 2 if "ringbpt" in kernel[0] else 1])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
