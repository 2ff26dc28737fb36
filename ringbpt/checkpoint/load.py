"""`--load_checkpoint=PREFIX::PATH`: a checkpoint of any kind, what it says about itself, and a model that runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from ringbpt.checkpoint.huggingface import CARRIED, describe_settings, is_own, load_folder, whole_architecture
from ringbpt.checkpoint.original import load_original
from ringbpt.checkpoint.peft import read_adapter
from ringbpt.checkpoint.store import Rule, Wanted, newest_step
from ringbpt.config import (
    RUN_FLAGS,
    Architecture,
    Config,
    Execution,
    UserError,
    check_mesh,
    choices,
    model_folder,
)
from ringbpt.config.foreign import read_field, read_json, user_path
from ringbpt.config.gguf import FOREIGN, find_foreign, model_settings
from ringbpt.dims import MeshShape
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.types import Params

TOKENIZER = "tokenizer"  # the folder in a run's that keeps its tokenizer


@dataclass(frozen=True)
class Found:
    """What a --load_checkpoint says about itself. folder: what came with the model (config.json, tokenizer), if
    anything did; vocab_file: the tokenizer that a run has kept, or what its --tokenizer.vocab_file was."""

    architecture: Architecture
    folder: Path | None
    vocab_file: str


def describe_checkpoint(spec: str) -> Found:
    """The model's flags that PREFIX::PATH was saved with, without reading a weight.

    Raises UserError where nothing beside the weights tells them, as beside a file of the original project.
    """
    prefix, path = find_checkpoint(spec)
    if prefix in FOREIGN or is_own(path):
        beside = path if prefix in FOREIGN else path / CARRIED
        return Found(describe_settings(*model_settings(beside)), beside if beside.is_dir() else None, str(beside))
    for run in (path, *path.parents[:2]):  # a run, its checkpoints, or one of its steps
        if (run / "config.json").is_file():
            break
    else:
        raise UserError(
            f"--load_checkpoint={spec}: no config.json of a run beside it says what model this is: name the run's "
            "folder, or a Hugging Face folder with huggingface::"
        )
    tree, file = read_json(run / "config.json"), run / "config.json"
    if not isinstance(tree.get("llama"), dict) or not isinstance(tree.get("tokenizer"), dict):
        huggingface = f": it is a Hugging Face folder's, use huggingface::{run}" if "model_type" in tree else ""
        raise UserError(f"--load_checkpoint={spec}: {file} is no run's config.json{huggingface}")
    known = {item.name for item in fields(Architecture)}
    said = {
        name: read_field(value, RUN_FLAGS[f"llama.{name}"], f"{file}: llama.{name}")
        for name, value in tree["llama"].items()
        if name in known
    }
    architecture = whole_architecture(said, str(file))
    if isinstance(lora := tree.get("lora"), dict) and lora.get("rank"):
        base = tree.get("load_checkpoint") or "<the weights beside them>"
        raise UserError(
            f"--load_checkpoint={spec}: a run of adapters, which are nothing without the weights beside them: "
            f"--load_checkpoint={base} --adapter={run / 'adapter'}"
        )
    origin, vocab_file = tree.get("load_checkpoint", ""), tree["tokenizer"].get("vocab_file", "")
    for key, value in (("load_checkpoint", origin), ("tokenizer.vocab_file", vocab_file)):
        read_field(value, RUN_FLAGS[key], f"{file}: {key}")
    name = origin.removeprefix("huggingface::")
    folder = model_folder(name, "", download=False) if origin.startswith("huggingface::") else None
    kept = run / TOKENIZER
    vocab_file = str(kept) if kept.is_dir() else vocab_file
    return Found(architecture, folder if folder and folder.is_dir() else None, vocab_file)


def describe_predicting(spec: str) -> Found:
    """describe_checkpoint of a model that predicts tokens. Raises UserError for a reward model, which says scores."""
    found = describe_checkpoint(spec)
    if found.architecture.head == "score":
        raise UserError(
            f"--load_checkpoint={spec} is a reward model, which scores texts and predicts none: "
            "scripts/jax2hf.py makes it a folder for transformers' sequence classification"
        )
    return found


def load_checkpoint(spec: str, wanted: Mapping[str, Wanted], architecture: Architecture) -> tuple[dict[str, Any], str]:
    """(entries, note): what `--load_checkpoint=PREFIX::PATH` names, read straight onto the mesh.

    entries: the wanted ones and "meta", None where the checkpoint has none or they aren't taken. note: one line for the
    user, where something that the prefix asks for was left out; else empty.

    `params::` and `trainstate_params::` take the weights, `trainstate::` the optimizer state and the place in the
    data too, `flax_params::` the weights of a flax msgpack file. PATH is a folder of ours (a step, a `checkpoints`
    folder or a run, of which the newest step is taken) or a file of the original project, streaming or flax msgpack
    (its content says which); of a file's train state the weights alone are taken, and `note` says so. `huggingface::`
    takes a Hugging Face folder, or a model's name on the hub, `gguf::` a GGUF file, and `params::` a folder that
    scripts/hf2jax.py wrote.

    wanted: the entries of the model and the run at hand, of which "params" is one. architecture: the model's.
    Raises UserError for an unknown prefix, a missing path, a pickle, a truncated file, and any tensor that is
    missing, has no place or has another shape.
    """
    prefix, path = find_checkpoint(spec, weights=True)
    where, name, nothing = f"--load_checkpoint={spec}", spec.partition("::")[2], {**dict.fromkeys(wanted), "meta": None}
    if prefix in FOREIGN or (prefix == "params" and is_own(path)):
        return nothing | {"params": load_folder(path, architecture, wanted["params"])}, ""
    if path.is_file():
        train_state = prefix.startswith("trainstate")
        params = load_original(path, where, train_state, architecture, wanted["params"])
        note = f"{where}: took the weights; the original's optimizer state is not read, a new one starts"
        return nothing | {"params": params}, note if prefix == "trainstate" else ""
    if prefix == "flax_params":
        raise UserError(f"{where}: a folder, where a flax msgpack file is expected; for a folder use params::{name}")
    step = newest_step(path, where)
    if prefix != "trainstate":
        ignored = dict.fromkeys(("opt_state", "guard"), Wanted(rule=Rule.IGNORED))
        return step.restore({**wanted, **ignored}) | {"meta": None}, ""
    if "opt_state" not in step.trees:
        raise UserError(f"{where}: saved without optimizer state; use params::{name}")
    return step.restore(wanted), ""


def find_checkpoint(spec: str, weights: bool = False) -> tuple[str, Path]:
    """(prefix, path) of `--load_checkpoint=PREFIX::PATH`, of a model on the hub where the cache has it.

    weights: with them. Raises UserError for another prefix and a missing path.
    """
    prefix, _, name = spec.partition("::")
    where = f"--load_checkpoint={spec}"
    if prefix not in choices("load_checkpoint") or not name:
        kinds = (f"{prefix}::PATH" for prefix in choices("load_checkpoint"))
        raise UserError(f"{where}: expected one of {', '.join(kinds)}")
    path = (find_foreign(spec, weights) or user_path(name)).absolute()
    if not os.path.exists(path):
        raise UserError(f"{where}: no such file or folder")
    return prefix, path


def load_model(
    spec: str,
    mesh_shape: tuple[int, int, int, int],
    dtype: str = "fp32",
    execution: Execution | None = None,
    adapter: Path | None = None,
    **more: Any,
) -> tuple[Model, Params]:
    """The model of a checkpoint on a mesh over the first devices, its params in the compute dtype.

    execution None: ring attention in chunks, whatever it was trained with. adapter: a folder of PEFT's layout, whose
    pairs stand beside the weights. more: what else of the architecture is to be another, as max_sequence_length.
    Raises UserError where the mesh does not fit the model.
    """
    mesh_shape = MeshShape(*mesh_shape)
    architecture = replace(describe_checkpoint(spec).architecture, **more)
    execution = execution or default_execution(mesh_shape)
    check_mesh(Config(dtype=dtype, mesh_shape=mesh_shape, architecture=architecture, execution=execution))
    pairs = read_adapter(adapter, architecture) if adapter else None
    model = Model(architecture, execution, make_mesh(mesh_shape), dtype)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, COMPUTE_DTYPES[dtype], sharding=x.sharding), model.abstract_params
    )
    entries, _ = load_checkpoint(spec, {"params": Wanted(wanted, tables=model.tables)}, architecture)
    return pairs.on(model, entries["params"]) if pairs else (model, entries["params"])


def default_execution(mesh_shape: MeshShape) -> Execution:
    """How a model is run that is not trained: ring attention over sp, everything in chunks."""
    if mesh_shape.sp == 1:
        return Execution(attention_type="blockwise", sequence_layout="contiguous", scan_mlp=True)
    return Execution(attention_type="ring_blockwise", sequence_layout="zigzag", scan_mlp=True)
