"""Our TPU kernels beside jax's splash attention, for a TPU that need not be here: memory, traffic, and blocks computed.

python scripts/compare_splash.py [--topology=v5e-4] [--tokens=32768]
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from ringbpt.attention import MaskSpec, make_attention, permutation
from ringbpt.attention.core import row_visibility
from ringbpt.config import Flag, printed_help, read_flags, run_main
from ringbpt.mesh import make_mesh
from ringbpt.planning.topologies import topology
from ringbpt.types import TokenMeta

FLAGS = {
    "topology": Flag(str, "v5e-4", "a TPU, which need not be here"),
    "tokens": Flag(int, 32768, "queries and keys", at_least=512, at_most=1 << 24),
}
N, K, BLOCK = 8, 2, 512
NAMES = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")


def splash_kernel(tokens: int, fused: bool):
    """The gradients of splash with the same blocks; its backward in one kernel (5 products) or in two (7)."""
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((tokens, tokens))] * N)
    rest = {} if fused else {"block_q_dq": BLOCK, "block_kv_dq": BLOCK}
    sizes = splash.BlockSizes(**dict.fromkeys(NAMES, BLOCK), **rest, use_fused_bwd_kernel=fused)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes)


def visits(q_position, kv_position, segment_q, segment_kv) -> int:
    metas = (TokenMeta(q_position[None], segment_q[None]), TokenMeta(kv_position[None], segment_kv[None]))
    return int(row_visibility(*metas, MaskSpec(), BLOCK, BLOCK)[0].sum())


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    name, T = read_flags(argv, FLAGS).values()
    jax.config.update("jax_platforms", "cpu")  # whatever is here, nothing runs on it
    machine = topology(name)
    mesh = make_mesh((1, 1, 1, 1), devices=machine.devices[:1])
    print(f"{name}, jax {jax.__version__}, {T} tokens, {N} query and {K} kv heads, bfloat16, blocks of {BLOCK}, causal")
    print("| gradient of one attention | head dim | temporary MiB | bytes accessed, MiB |\n|---|---|---|---|")
    for head_dim in (64, 128):
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        q, k = (jax.ShapeDtypeStruct((1, T, n, head_dim), jnp.bfloat16, sharding=replicated) for n in (N, K))
        at = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=replicated)
        sizes = {"query_chunk_size": BLOCK, "key_chunk_size": BLOCK}
        attend = make_attention(mesh, strategy="none", local="pallas_tpu", **sizes)
        programs = {"ours": lambda *args, attend=attend: attend(*args)}
        for fused in (False, True):
            kernel = splash_kernel(T, fused)

            def theirs(q, k, v, meta, kernel=kernel):
                segments = splash.SegmentIds(meta.segment_BT[0], meta.segment_BT[0])
                return kernel(*(x[0].swapaxes(0, 1) for x in (q, k, v)), segments).swapaxes(0, 1)[None]

            programs[f"splash, backward in {'one kernel' if fused else 'two kernels'}"] = theirs
        for which, function in programs.items():

            def total(q, k, v, meta, function=function):
                return jnp.sum(function(q, k, v, meta).astype(jnp.float32) ** 2)

            compiled = machine.compile(jax.jit(jax.grad(total, (0, 1, 2))), q, k, k, TokenMeta(at, at))
            mib = [compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["bytes accessed"]]
            print(f"| {which} | {head_dim} | {mib[0] / 2**20:.0f} | {mib[1] / 2**20:.0f} |")
    place, one = np.arange(T, dtype=np.int32), np.ones(T, np.int32)
    order = permutation("zigzag", 8 * T, 8).reshape(8, T).astype(np.int32)
    blocks = (T // BLOCK) ** 2
    causal = int(np.count_nonzero(splash_kernel(T, False).fwd_mask_info.block_mask))
    print(f"\n| blocks computed a head, of {blocks} | ours | splash |\n|---|---|---|")
    print(f"| causal | {visits(place, place, one, one)} | {causal} |")
    document = place // (T // 8) + 1
    print(f"| 8 packed documents | {visits(place % (T // 8), place % (T // 8), document, document)} | {causal} |")
    hops = [visits(order[0], order[i], one, one) for i in range(1, 8)]
    print(f"| a hop of a zigzag ring of 8 | {np.mean(hops):.0f} | {blocks} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
