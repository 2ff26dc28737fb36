"""A checkpoint of any kind -> a model that runs: its flags, its params on the mesh, and the folder of its tokenizer."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ringbpt.checkpoint import huggingface as hf
from ringbpt.checkpoint.store import find_checkpoint, flatten, load_checkpoint, newest_step
from ringbpt.config import Architecture, Config, Execution, UserError, check_mesh
from ringbpt.config.families import llama_fields, read_json
from ringbpt.dims import MeshShape
from ringbpt.layouts import inverse, permutation
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.types import Params, TokenMeta


@dataclass(frozen=True)
class Found:
    """What a --load_checkpoint says about itself. folder: what came with the model (config.json, tokenizer), if
    anything did; vocab_file: what a run's own --tokenizer.vocab_file was."""

    architecture: Architecture
    folder: Path | None
    vocab_file: str


def describe_checkpoint(spec: str) -> Found:
    """The model's flags that PREFIX::PATH was saved with, without reading a weight.

    Raises UserError where nothing beside the weights tells them, as beside a file of the original project.
    """
    prefix, path = find_checkpoint(spec)
    if prefix == "huggingface" or hf.is_own(path):
        beside = path if prefix == "huggingface" else path / hf.CARRIED
        settings = llama_fields(read_json(beside / "config.json"), str(beside / "config.json"))
        return Found(hf.complete(replace(Architecture(), **settings)), beside, str(beside))
    for run in (path, *path.parents[:2]):  # a run, its checkpoints, or one of its steps
        if (run / "config.json").is_file():
            break
    else:
        raise UserError(
            f"--load_checkpoint={spec}: no config.json of a run beside it says what model this is: name the run's "
            "folder, or a Hugging Face folder with huggingface::"
        )
    tree = read_json(run / "config.json")
    known = {item.name for item in fields(Architecture)}
    architecture = Architecture(**{name: value for name, value in tree["llama"].items() if name in known})
    origin = tree.get("load_checkpoint", "")
    folder = Path(origin.removeprefix("huggingface::")) if origin.startswith("huggingface::") else None
    return Found(architecture, folder if folder and folder.is_dir() else None, tree["tokenizer"]["vocab_file"])


def load_model(
    spec: str,
    mesh_shape: tuple[int, int, int, int],
    dtype: str = "fp32",
    execution: Execution | None = None,
    **more: Any,
) -> tuple[Model, Params]:
    """The model of a checkpoint on a mesh over the first devices, its params in the compute dtype.

    execution None: ring attention in chunks, whatever it was trained with. more: what else of the architecture is to
    be another, as max_sequence_length. Raises UserError where the mesh does not fit the model.
    """
    mesh_shape = MeshShape(*mesh_shape)
    architecture = replace(describe_checkpoint(spec).architecture, **more)
    execution = execution or default_execution(mesh_shape)
    check_mesh(Config(dtype=dtype, mesh_shape=mesh_shape, architecture=architecture, execution=execution))
    model = Model(architecture, execution, make_mesh(mesh_shape), dtype)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, COMPUTE_DTYPES[dtype], sharding=x.sharding), model.abstract_params
    )
    return model, load_checkpoint(spec, wanted, None, architecture).params


def default_execution(mesh_shape: MeshShape) -> Execution:
    """How a model is run that is not trained: ring attention over sp, everything in chunks."""
    if mesh_shape.sp == 1:
        return Execution(attention_type="blockwise", sequence_layout="contiguous", scan_mlp=True)
    return Execution(attention_type="ring_blockwise", sequence_layout="zigzag", scan_mlp=True)


def logits(model: Model, params: Params, token_BT: np.ndarray) -> np.ndarray:
    """[B, T, V] float32, each row one text; for tests and reports, where T and V are small."""
    order = permutation(model.execution.sequence_layout, token_BT.shape[1], model.mesh.shape["sp"])
    position_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)[:, order]
    meta = TokenMeta(position_BT, np.ones_like(position_BT))
    hidden_BTD = jax.jit(model.hidden)(params, token_BT[:, order], meta)
    hidden_BTD = np.asarray(hidden_BTD, np.float32)[:, inverse(order)]
    return hidden_BTD @ np.asarray(model.unembed(params), np.float32)


def report_parity(spec: str, folder: Path) -> str:
    """One line: our logits of a checkpoint against those of transformers for the same model's folder."""
    model, params = load_model(spec, (1, 1, 1, 1))
    found = hf.parity(folder, lambda token_BT: logits(model, params, token_BT))
    return (
        f"verify: {found['tokens']} tokens, float32: largest difference of a logit {found['largest_difference']:.2e} "
        f"(largest logit {found['largest_logit']:.2f}), same best token {100 * found['same_best_token']:.1f} %"
    )


def to_huggingface(spec: str, output: Path, base: Path | None, dtype: str, max_shard_bytes: int) -> None:
    """A checkpoint of ours -> a Hugging Face folder; of an Orbax one, a param at a time is read."""
    prefix, path = find_checkpoint(spec)
    if prefix == "huggingface":
        raise UserError(f"--load_checkpoint={spec} is a Hugging Face folder already: copy it")
    if prefix == "params" and hf.is_own(path):
        hf.to_huggingface(path, output, dtype, max_shard_bytes)
        return
    found = describe_checkpoint(spec)
    step = newest_step(path, f"--load_checkpoint={spec}")
    reader = ocp.PyTreeCheckpointer()
    stored = flatten(reader.metadata(step / "params").item_metadata.tree)
    kinds = {np.dtype(COMPUTE_DTYPES[name]): name for name in hf.HF_DTYPES}

    def read(name: str) -> np.ndarray:
        if name not in stored:
            raise UserError(f"--load_checkpoint={spec}: parameter {name} is not in the checkpoint")
        tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split(".")):
            tree = {part: tree}
        item = jax.tree.map(lambda _: 0, tree)
        args = ocp.args.PyTreeRestore(item=item, restore_args=tree, partial_restore=True)
        return jax.tree.leaves(reader.restore(step / "params", args=args))[0]

    dtype = dtype or kinds[np.dtype(stored["embed"].dtype)]
    hf.export(read, found.architecture, output, base or found.folder, dtype, max_shard_bytes)
    vocab_file = Path(found.vocab_file)
    if base is None and found.folder is None and vocab_file.exists():
        hf.carry_tokenizer(vocab_file if vocab_file.is_dir() else vocab_file.parent, output)
