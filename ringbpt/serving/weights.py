"""The weights that are served: what they are, and others of the same model read from a disk in their place."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import jax

from ringbpt.checkpoint import digests
from ringbpt.checkpoint.load import describe_predicting, load_model
from ringbpt.config import DTYPES, UserError, user_path
from ringbpt.config.foreign import shown
from ringbpt.evaluation.reference import weights_fingerprint
from ringbpt.generation.generator import Generator
from ringbpt.types import Params

# What a config.json says beside that decides nothing of what is computed here.
NOT_OF_WEIGHTS = {"bos_token_id", "eos_token_id", "initializer_range"}


class Weights:
    """version: a number of ours, one more at each update, or what the update says. source: where they were read."""

    def __init__(self, generator: Generator, params: Params, source: str, dtype: str, adapter: str = ""):
        self._generator, self._dtype = generator, DTYPES[dtype]
        self._source, self._adapter = source, adapter
        self._version: int | str = 0
        self._fingerprint = weights_fingerprint(params)

    def info(self) -> dict[str, Any]:
        about = {"version": self._version, "fingerprint": self._fingerprint, "source": self._source}
        return about | ({"adapter": self._adapter} if self._adapter else {})

    def loading(self, body: Any) -> Callable[[], dict[str, Any]]:
        """What takes the weights that an update's body names, and tells what then is served: for the worker's thread.

        Raises UserError for what is no update.
        """
        names = ("load_checkpoint", "model_path", "adapter", "version")
        if not isinstance(body, dict) or set(body) - set(names):
            raise UserError(f"the body must be a JSON object of {', '.join(names)}")
        source, folder, adapter = (body.get(name) or "" for name in names[:3])
        if not all(isinstance(each, str) and "\0" not in each for each in (source, folder, adapter)):
            raise UserError(f"{', '.join(names[:3])} must be texts")
        if bool(source) == bool(folder):
            raise UserError("give one of load_checkpoint, as PREFIX::PATH, and model_path, a Hugging Face folder")
        version = body.get("version")
        if version is not None and (isinstance(version, bool) or not isinstance(version, int | str)):
            raise UserError(f"version={shown(version)} is neither a whole number nor a text")
        return lambda: self._load(source or f"huggingface::{folder}", adapter, version)

    def _load(self, source: str, adapter: str, version: int | str | None) -> dict[str, Any]:
        """Raises UserError for another model; what was served then goes on being served."""
        folder = user_path(source.partition("::")[2])
        if folder.is_dir() and digests.are_in(folder) and (what := digests.problem(folder)):
            raise UserError(f"{source}: {what}: it was not written to its end, or has changed since")
        model = self._generator.model
        length = model.architecture.max_sequence_length
        found = replace(describe_predicting(source).architecture, max_sequence_length=length)
        free = NOT_OF_WEIGHTS | ({"rope_scaling_original_length"} if not found.rope_scaling_type else set())
        for item in fields(found):
            if item.name in free:
                continue
            theirs, ours = getattr(found, item.name), getattr(model.architecture, item.name)
            if theirs != ours:
                raise UserError(
                    f"{source} is another model: its {item.name} is {shown(theirs)}, and {shown(ours)} is served"
                )
        shape = tuple(model.mesh.shape.values())
        pairs = user_path(adapter) if adapter else None
        _, params = load_model(source, shape, self._dtype, model.execution, pairs, max_sequence_length=length)
        if _described(params) != _described(model.abstract_params):
            raise UserError(f"{source} has other weights than are served, as with and without adapters")
        self._generator.update(params)
        if version is None:
            version = self._version + 1 if isinstance(self._version, int) else 1
        self._source, self._adapter, self._version = source, adapter, version
        self._fingerprint = weights_fingerprint(params)
        return self.info()


def _described(params: Params) -> Any:
    """Names and shapes of the weights."""
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
