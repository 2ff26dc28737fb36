"""The memory of a rollout on the run's own devices: what samples, beside what is trained; in the step it is gone.

Of the programs, a layer's prefill and the step of all layers are compiled; the rest is shapes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config, UserError
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.generation.decode import CACHE, Cache, empty_cache, make_prefill_layer, make_split, weight_specs
from ringbpt.generation.stream import BatchShape, make_step, new_share, no_texts, rows_at_once
from ringbpt.layouts import row_length
from ringbpt.mesh import mesh_of
from ringbpt.model.llama import Model
from ringbpt.planning.program import needed_bytes, shard_bytes
from ringbpt.planning.topologies import Topology
from ringbpt.types import TokenMeta


@dataclass(frozen=True)
class Sampling:
    """Bytes of one device. weights: as they are decoded with, in the compute dtype and split over tp alone. working:
    the larger of the two programs' temporaries. prompt, rows: tokens of a prompt, and prompts under way at a time.
    """

    weights: int
    cache: int
    working: int
    prompt: int
    rows: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def longest_prompt(config: Config) -> int:
    """Tokens of a prompt that stands in a row with all its answers, as long as they may be; at least 1."""
    rollout, length = config.rollout, config.train_dataset.seq_length
    prompt = length + 1 - rollout.samples_per_prompt * rollout.most_drawn
    if prompt < 1:
        flag = f"--train_dataset.{config.train_dataset.group}.seq_length"
        raise UserError(
            f"{flag}={length} does not hold --rollout.samples_per_prompt={rollout.samples_per_prompt} answers of "
            f"--rollout.max_new_tokens={rollout.max_new_tokens}: {flag}={length - prompt + 1} and what a prompt has"
        )
    return prompt


def rows_of_step(config: Config) -> int:
    """Rows of a step that learns from rollouts, each of them one prompt with its answers, as collect.py has them."""
    parts = config.mesh_shape.row_shards * config.optimizer.accumulate_gradient_steps
    per_update = math.ceil(config.rollout.prompts_per_step / config.rollout.updates)
    return math.ceil(per_update / parts) * parts


def compile_sampling(config: Config, machine: Topology) -> Sampling:
    """For prompts as long as a row of the step has room for. What does not fit is a Sampling too, with the bytes that
    it would need.
    """
    mesh = mesh_of(config, machine.devices)
    model, rollout, sizes = Model.of(config, mesh), config.rollout, mesh.shape
    prompt, parts = longest_prompt(config), sizes["dp"] * sizes["fsdp"]
    length = row_length(prompt, sizes["sp"], config.execution.scan_mlp_chunk_size)
    shape = BatchShape(0, length, rollout.samples_per_prompt, rollout.most_drawn)
    shape = shape._replace(rows=rows_at_once(shape, rollout.prompts_per_step, mesh))

    def placed(tree: Any, dims: str) -> Any:
        sharding = NamedSharding(mesh, spec(dims, ACTIVATION_AXES))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    weights = jax.tree.map(
        lambda x, part: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, part)),
        jax.eval_shape(make_split(model), model.abstract_params),
        weight_specs(model),
    )
    places = shape.length + new_share(shape, sizes["sp"]) * sizes["sp"]
    found = jax.eval_shape(empty_cache(model, shape.rows, places, shape.texts > 1))
    cache = Cache(placed(found.k, CACHE), placed(found.v, CACHE), placed(found.meta, "B S"))
    texts, told = placed((no_texts((shape.rows, shape.texts)), jnp.zeros((shape.rows, shape.texts), jnp.int32)), "B _")
    step = make_step(model, shape.length // sizes["sp"], True)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    x_BTD = placed(jax.ShapeDtypeStruct((parts, length, model.architecture.hidden_size), model.dtype), "B T D")
    place_BT = placed(jax.ShapeDtypeStruct((parts, length), jnp.int32), "B T")
    metas = TokenMeta(*[place_BT] * (3 if shape.texts > 1 else 2))
    temporaries = partial(_temporaries, machine)
    working = max(
        temporaries(step, weights, cache, told, None, texts, number),
        temporaries(make_prefill_layer(model), weights["layers"][0], x_BTD, metas) + shard_bytes(x_BTD),
    )
    return Sampling(shard_bytes(weights), shard_bytes(cache), working, prompt, shape.rows)


def _temporaries(machine: Topology, program: Any, *arguments: Any) -> int:
    """Of a program, as the compiler says, or would have needed where it gives up."""
    try:
        return machine.compile(program, *arguments).memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        total = needed_bytes(str(error))
        if total is None:
            raise
        return max(total - shard_bytes(arguments), 0)
