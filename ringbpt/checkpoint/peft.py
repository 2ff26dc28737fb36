"""Adapters in PEFT's layout, both ways: `adapter_model.safetensors` and `adapter_config.json`.

A pair is `base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; it counts alpha / rank,
or alpha / sqrt(rank) with use_rslora; rank_pattern and alpha_pattern say other ones by modules' names. Ours are stacked
over layers: where a file's differ in rank, or a layer has none, zeros fill up, which change nothing and learn nothing.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import numpy as np

from ringbpt.checkpoint.safetensors import FolderWriter, Planned, TensorFolder
from ringbpt.config import Architecture, LoraConfig, UserError
from ringbpt.config.families import SCORE, TensorRow, family_of
from ringbpt.config.foreign import read_json, shown
from ringbpt.config.lora import MODULES, module_name, valued
from ringbpt.model.adapters import SCALE, A, B, Pair
from ringbpt.model.llama import Model, make_dims
from ringbpt.types import Params

STEM, CONFIG = "adapter_model", "adapter_config.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"base_model\.model\.(model\.layers\.(\d{1,5})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight"
)
_SCORE = re.compile(r"base_model\.model\.score(\.modules_to_save(\.default)?)?\.weight")
# What an adapter may ask for that ours do not do: the value that means nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None), "use_qalora": (False, None),
    "lora_bias": (False, None), "modules_to_save": (None, [], ["score"]), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,), "megatron_config": (None,),
}  # fmt: skip


class Adapter(NamedTuple):
    """pairs: of the weights that have one, with the largest rank. layers: their arrays by our names, float32, stacked
    where the architecture stacks layers. score: a reward model's head, [D], or None.
    """

    pairs: tuple[Pair, ...]
    layers: dict[str, np.ndarray]
    score: np.ndarray | None = None

    def on(self, model: Model, params: Params) -> tuple[Model, Params]:
        """The model with the adapter beside its weights, and its params."""
        head = model.architecture.head if self.score is None else "score"
        model = replace(model, pairs=self.pairs, architecture=replace(model.architecture, head=head))
        own = {name: jax.device_put(array, model.shardings["layers"][name]) for name, array in self.layers.items()}
        if self.score is not None:
            score = jax.device_put(self.score, model.shardings["score"])
            params = {name: x for name, x in params.items() if name != "unembed"} | {"score": score}
        return model, params | {"layers": params["layers"] | own}


def _patterns(architecture: Architecture, weight: str) -> tuple[str, str]:
    """Of lora_A and lora_B, from theirs to ours: ("A D -> D A", "(N H) A -> A N H")."""
    _, family = family_of(architecture)
    row: TensorRow = next(row for row in family.rows if row.ours == f"layers.{weight}")
    y, x = re.findall(r"\([^)]*\)|\S+", row.pattern.partition(" -> ")[0])
    bare = lambda group: group.strip("()")  # noqa: E731
    return f"A {x} -> {bare(x)} A", f"{y} A -> A {bare(y)}"


def _sizes(architecture: Architecture, pattern: str) -> dict[str, int]:
    known = asdict(make_dims(architecture))
    return {letter: known[letter] for letter in set(re.findall(r"[A-Z]", pattern)) - {"A"}}


def read_adapter(folder: Path, architecture: Architecture) -> Adapter:
    """Raises UserError, naming the file, for what is no adapter, for kinds of them that are not known here, and for
    tensors that are missing, have no place or another shape.
    """
    file = folder / CONFIG
    if not os.path.isfile(file):  # where Path would raise, of a name that is too long
        raise UserError(f"--adapter={folder}: no {CONFIG} there: the folder of an adapter in PEFT's layout")
    settings, files = read_json(file), TensorFolder(folder, STEM)
    rank, alpha, patterns = _check(settings, file)
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    score = None
    for name in files.entries:
        if _SCORE.fullmatch(name):
            score = files.read(name).astype(np.float32).reshape(-1)
            continue
        match = _TENSOR.fullmatch(name)
        if not match or match[3] not in MODULES or module_name(match[3], int(match[2])) != match[1]:
            raise UserError(f"{files.folder}: tensor {name} has no place: pairs of {', '.join(MODULES)} have")
        if int(match[2]) >= architecture.num_hidden_layers:
            raise UserError(f"{files.folder}: tensor {name}: the model has {architecture.num_hidden_layers} layers")
        found.setdefault(match[3], {}).setdefault(int(match[2]), {})[match[4]] = files.read(name).astype(np.float32)
    pairs: list[Pair] = []
    layers: dict[str, np.ndarray] = {}
    for module in [module for module in MODULES if module in found]:
        scales = {}
        for layer, pair in found[module].items():
            name = module_name(module, layer)
            own = valued(patterns["rank_pattern"], name, rank)
            if pair.keys() != {"A", "B"} or len(pair["A"]) != own or pair["B"].shape[1:] != (own,):
                shapes = {f"lora_{key}": array.shape for key, array in sorted(pair.items())}
                raise UserError(f"{files.folder}: {name} has {shapes}, and {CONFIG} means a pair of rank {own}")
            factor = math.sqrt(own) if settings.get("use_rslora") else own
            scales[layer] = valued(patterns["alpha_pattern"], name, alpha) / factor
        stacked, largest = _stacked(MODULES[module], found[module], architecture, files.folder)
        layers |= stacked
        layers[MODULES[module] + SCALE] = np.array(
            [scales.get(layer, 0.0) for layer in range(architecture.num_hidden_layers)], np.float32
        )
        pairs.append(Pair(MODULES[module], largest, max(scales.values())))
    if not pairs:
        raise UserError(f"{files.folder}: no pair in it")
    return Adapter(tuple(pairs), layers, score)


def _check(settings: Mapping[str, Any], file: Path) -> tuple[int, float, dict[str, dict[str, Any]]]:
    """(rank, alpha, {rank_pattern, alpha_pattern}) of an adapter_config.json."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type={shown(settings.get('peft_type'))}: only LORA is known here")
    for key, allowed in _ONLY.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file}: {key}={shown(settings[key])} is not supported: only {allowed[0]!r} is")
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)  # PEFT's own
    patterns = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    numbers = {"r": rank, "lora_alpha": alpha} | {
        f"{name}: {key}": value
        for name, pattern in patterns.items()
        if isinstance(pattern, dict)
        for key, value in pattern.items()
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UserError(f"{file}: {name}={shown(value)} is no number above 0")
    for name, pattern in patterns.items():
        try:
            [re.compile(key) for key in pattern] if isinstance(pattern, dict) else 1 / 0
        except (re.error, ZeroDivisionError, TypeError):
            raise UserError(f"{file}: {name}={shown(pattern)} is no object of patterns") from None
    return rank, alpha, patterns


def _stacked(
    weight: str, found: Mapping[int, Mapping[str, np.ndarray]], architecture: Architecture, folder: Path
) -> tuple[dict[str, np.ndarray], int]:
    """({our name: array}, the largest rank) of a module's pairs, by layer."""
    largest = max(len(pair["A"]) for pair in found.values())
    result = {}
    for part, letter, pattern in zip((A, B), "AB", _patterns(architecture, weight), strict=True):
        sizes, arrays = _sizes(architecture, pattern), []
        theirs, ours = pattern.split(" -> ")
        for layer in range(architecture.num_hidden_layers):
            if layer in found:
                array = found[layer][letter]
                try:
                    array = einops.rearrange(array, pattern, **_inner(theirs, sizes))
                    wanted = {name: size for name, size in zip(ours.split(), array.shape, strict=True) if name != "A"}
                    assert wanted == {name: sizes[name] for name in wanted}
                except (einops.EinopsError, AssertionError):
                    name = module_name(next(m for m, w in MODULES.items() if w == weight), layer)
                    raise UserError(
                        f"{folder}: {name}.lora_{letter} has shape {found[layer][letter].shape}, which this model's "
                        "sizes do not allow: it is of another base model"
                    ) from None
            else:
                array = np.zeros([1 if name == "A" else sizes[name] for name in ours.split()], np.float32)
            widths = [
                (0, largest - size if name == "A" else 0) for name, size in zip(ours.split(), array.shape, strict=True)
            ]
            arrays.append(np.pad(array, widths))
        result[weight + part] = np.stack(arrays, architecture.param_scan_axis)
    return result, largest


def _inner(side: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """What einops cannot tell from a shape: of a group all but the first letter."""
    groups = [group.split() for group in re.findall(r"\(([^)]*)\)", side)]
    return {letter: sizes[letter] for group in groups for letter in group[1:]}


def write_adapter(
    folder: Path,
    layers: Mapping[str, np.ndarray],
    lora: LoraConfig,
    pairs: tuple[Pair, ...],
    architecture: Architecture,
    base: str,
    score: np.ndarray | None = None,
) -> None:
    """layers: the pairs' arrays by our names, stacked. base: where the weights beside them come from. Raises UserError
    where the folder is there already.
    """
    tensors: dict[str, np.ndarray] = {}
    names = {weight: module for module, weight in MODULES.items()}
    for pair in pairs:
        for part, letter, pattern in zip((A, B), "AB", _patterns(architecture, pair.weight), strict=True):
            theirs, ours = pattern.split(" -> ")
            sizes = _sizes(architecture, pattern)
            stack = np.moveaxis(layers[pair.weight + part], architecture.param_scan_axis, 0)
            for layer, array in enumerate(stack):
                name = f"{_PREFIX}{module_name(names[pair.weight], layer)}.lora_{letter}.weight"
                given = _inner(theirs, sizes)
                tensors[name] = np.ascontiguousarray(einops.rearrange(array, f"{ours} -> {theirs}", **given))
    if score is not None:
        tensors[f"{_PREFIX}{SCORE.theirs}"] = score[None]
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if architecture.head == "score" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": [names[pair.weight] for pair in pairs],
        "rank_pattern": {names[p.weight]: p.rank for p in pairs if p.rank != lora.rank},
        "alpha_pattern": _alphas(lora, pairs, names),
        "modules_to_save": None if score is None else ["score"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with FolderWriter(folder, [Planned(n, x.dtype, x.shape) for n, x in tensors.items()], 1 << 40, STEM) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
        (writer.partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _alphas(lora: LoraConfig, pairs: tuple[Pair, ...], names: Mapping[str, str]) -> dict[str, float]:
    """The alphas that are not the usual one."""
    usual = lora.rank if lora.alpha is None else lora.alpha
    own = {names[p.weight]: p.scale * (math.sqrt(p.rank) if lora.rslora else p.rank) for p in pairs}
    return {name: alpha for name, alpha in own.items() if not math.isclose(alpha, usual)}
