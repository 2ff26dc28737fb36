"""A policy's weights on their way to servers: a Hugging Face folder a version, and what proves that they arrived.

`weights/<version>` of a run's folder is there whole or not at all: written beside, with digests, and renamed. In it are
the weights, those of adapters added to what they stand beside; READY, for whoever waits for a folder to be whole; and
a probe: texts, and what the trainer says of the token behind each, which a server that has read the folder says too.
"""

import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.checkpoint import digests
from ringbpt.checkpoint.export import make_weights, write_weights
from ringbpt.checkpoint.huggingface import MAX_SHARD_BYTES, write_settings
from ringbpt.config import UserError
from ringbpt.config.shown import one_line
from ringbpt.evaluation.score import Scorer
from ringbpt.layouts import permutation
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.types import Params, TokenMeta

FOLDER, READY, PROBE = "weights", "READY", "probe.npz"
PROBE_TOKENS, PROBES = 64, 16  # of the one text, and beginnings of it


class Probe(NamedTuple):
    """prompts: as token ids. logp_PV: float32, the trainer's log-probability of each token behind each, in nats, at the
    temperature of sampling.
    """

    prompts: list[list[int]]
    logp_PV: np.ndarray

    def said(self, tokens: list[int]) -> np.ndarray:
        """What the trainer says of one token behind each prompt."""
        return self.logp_PV[np.arange(len(tokens)), tokens]


class Version(NamedTuple):
    """Weights to be read by servers. number: of the rollout before whose first step they were the policy's."""

    number: int
    folder: Path

    def probe(self) -> Probe:
        """Raises UserError, code 3, where it cannot be read."""
        try:
            return self._probe()
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{self.folder / PROBE}: {one_line(error)}", code=3) from None

    def _probe(self) -> Probe:
        with np.load(self.folder / PROBE) as stored:
            text, ends = stored["text"].tolist(), stored["ends"].tolist()
            return Probe([text[:end] for end in ends], stored["logp"])


class Shelf:
    """A run's folder of versions. text: the tokens of which beginnings are the probe."""

    def __init__(self, run: Path, model: Model, dtype: str, given: dict[str, Any], text: np.ndarray):
        """dtype: of the weights that are written, "bf16". given: the config.json that the run's model began with."""
        self._folder, self._model, self._cast, self._given = run / FOLDER, model, np.dtype(COMPUTE_DTYPES[dtype]), given
        self._weights, self._log_softmax = make_weights(model, self._cast), _log_softmax(model)
        self._text = text[:PROBE_TOKENS]
        self._ends = np.unique(np.linspace(1, len(self._text), PROBES).astype(int))

    def version(self, number: int) -> Version:
        return Version(number, (self._folder / f"{number:08d}").absolute())

    def has(self, number: int) -> bool:
        """Whether it is there as it was written: all of it is read, where it is there before it is put, as in a run
        that goes on.
        """
        folder = self.version(number).folder
        with suppress(OSError):
            return (folder / READY).is_file() and not digests.problem(folder)
        return False

    def put(self, number: int, params: Params) -> None:
        """All processes call it; process 0 writes. Raises UserError, code 4, where that cannot be."""
        folder, is_main = self.version(number).folder, jax.process_index() == 0
        new = folder.with_name(f"{folder.name}.new")
        if is_main:
            for old in (new, folder):
                shutil.rmtree(old, ignore_errors=True)
        logp_PV = self._distributions(params)
        what = self._model.architecture, self._cast, self._given
        settings = write_weights(self._weights(params), *what, new, MAX_SHARD_BYTES, "--rollout.servers")
        if not is_main:
            return
        try:
            write_settings(new, settings)
            np.savez(new / PROBE, text=self._text, ends=self._ends, logp=logp_PV)
            digests.write(new)
            (new / READY).touch()
            new.rename(folder)
            digests.sync(self._folder)
        except OSError as error:
            raise UserError(f"{new}: {error.strerror}", code=4) from None

    def drop_before(self, number: int) -> None:
        """What no rollout is sampled by any more, and what was never finished."""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if not path.name.isdigit() or int(path.name) < number:
                shutil.rmtree(path, ignore_errors=True)

    def _distributions(self, params: Params) -> np.ndarray:
        """[P, V] float32, the log-probabilities behind each beginning."""
        execution, mesh = self._model.execution, self._model.mesh
        length = Scorer(self._model, rows=1).row_length(len(self._text))
        order = permutation(execution.sequence_layout, length, mesh.shape["sp"])
        rows = mesh.shape["dp"] * mesh.shape["fsdp"]
        token_T, segment_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
        token_T[: len(self._text)], segment_T[: len(self._text)] = self._text, 1
        of_text = (token_T, np.arange(length, dtype=np.int32), segment_T)
        whole = [np.broadcast_to(x_T[order], (rows, length)) for x_T in of_text]
        place_P = np.argsort(order)[self._ends - 1]
        return np.asarray(self._log_softmax(params, *whole, place_P))


def _log_softmax(model: Model) -> Any:
    everywhere = NamedSharding(model.mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere)
    def found(params: Params, token_BT: Any, position_BT: Any, segment_BT: Any, place_P: Any) -> jax.Array:
        hidden_BTD = model.hidden(params, token_BT, TokenMeta(position_BT, segment_BT))
        unembed_DV = model.unembed(params).astype(hidden_BTD.dtype)
        logits_PV = jnp.dot(hidden_BTD[0, place_P], unembed_DV, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits_PV[:, : model.architecture.vocab_size] / model.temperature)

    return found
