"""A checkpoint of any kind -> a model that runs: its flags, its params on the mesh, and the folder of its tokenizer."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from ringbpt.checkpoint.huggingface import CARRIED, describe_settings, is_own
from ringbpt.checkpoint.store import find_checkpoint, load_checkpoint
from ringbpt.config import Architecture, Config, Execution, UserError, check_mesh
from ringbpt.config.families import read_json
from ringbpt.dims import MeshShape
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.types import Params


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
    if prefix == "huggingface" or is_own(path):
        beside = path if prefix == "huggingface" else path / CARRIED
        where = beside / "config.json"
        return Found(describe_settings(read_json(where), str(where)), beside, str(beside))
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
