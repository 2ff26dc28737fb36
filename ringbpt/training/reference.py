"""The model that a run is compared with: which weights it has, and how what it says comes to the objective."""

from collections.abc import Mapping
from functools import cached_property

import jax

from ringbpt.checkpoint.load import load_checkpoint
from ringbpt.checkpoint.store import Wanted
from ringbpt.config import Config, UserError
from ringbpt.data.epochs import cache_folder
from ringbpt.data.loader import Loader
from ringbpt.evaluation.reference import ReferenceColumns, weights_fingerprint
from ringbpt.model.llama import Model
from ringbpt.model.weights import merge, part_of
from ringbpt.training.metrics import say
from ringbpt.training.run import Run
from ringbpt.training.state import StateLayout, TrainState
from ringbpt.types import Params


class Reference:
    """The weights that --reference_checkpoint names, else those that the run has started from.

    A run that goes on keeps to the reference it has begun with: its fingerprint is in the checkpoints.
    """

    def __init__(self, config: Config, model: Model, known: dict[str, str] | None = None, first: Params | None = None):
        """known: what `described` was when the run began. first: the weights that it starts from, where it does now."""
        self._config, self._model = config, model
        self._first = None if config.reference_checkpoint else first
        self.source = config.reference_checkpoint or config.load_checkpoint or f"seed {config.seed}"
        known = known or {}
        self._known = known.get("fingerprint", "")
        self._is_known = bool(self._known) and known.get("source") == self.source

    @cached_property
    def fingerprint(self) -> str:
        return self._known if self._is_known else weights_fingerprint(self.params())

    @property
    def described(self) -> dict[str, str]:
        """Which weights these are, for a run's checkpoints."""
        return {"source": self.source, "fingerprint": self.fingerprint}

    def params(self) -> Params:
        """All of its weights, on the devices. Raises UserError where they are others than the run began with."""
        return self._loaded if self._first is None else jax.device_put(self._first, self._model.shardings)

    @cached_property
    def _loaded(self) -> Params:
        model, config = self._model, self._config
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            model.abstract_params,
            model.shardings,
        )
        if spec := config.reference_checkpoint or config.load_checkpoint:
            wanted = {"params": Wanted(abstract, tables=model.tables)}
            params = load_checkpoint(spec, wanted, config.architecture)[0]["params"]
        else:
            params = model.init(jax.random.key(config.seed))
        if self._known and weights_fingerprint(params) != self._known:
            raise UserError(
                f"--reference_checkpoint={config.reference_checkpoint}: {self.source} has other weights than the "
                "reference that this run began with: give that one, or another --logger.experiment_id"
            )
        return params

    def column_of(self, loaders: Mapping[str, Loader]) -> dict[str, Loader]:
        """The loaders, by the names of their data sets, with what the reference says of each token as a column."""
        columns = ReferenceColumns(self._config, self._model, self.fingerprint, self.params, say)
        found = {}
        for name, loader in loaders.items():
            if not loader.stores:
                raise UserError(
                    f"--reference=columns does not go with --{name} that was packed before: --reference=step does"
                )
            found[name] = columns.added_to(loader, cache_folder(getattr(self._config, name), name), name)
        return found


def ask_reference(
    run: Run, layout: StateLayout, state: TrainState, loaders: dict[str, Loader]
) -> tuple[TrainState, dict[str, Loader]]:
    """The state with the reference's weights in it, or the loaders with what it says of each token as a column."""
    base = layout.model.base
    # Of a run that goes on, only the weights beside adapters are still those that it began with.
    first = None if run.goes_on and not layout.model.pairs else part_of(merge(state.trained, state.frozen), base.specs)
    reference = Reference(layout.config, base, run.reference, first)
    run.reference = reference.described
    if layout.has_reference and not layout.has_own_reference:
        return state, loaders
    if layout.has_reference:
        return layout.with_reference(state, reference.params()), loaders
    return state, reference.column_of(loaders)
