"""What a dataset's flags name: its sources, each with its share, behind the types that `--train_dataset.type` knows."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ringbpt.config import DatasetConfig, JsonDatasetConfig, UserError
from ringbpt.config.foreign import user_path
from ringbpt.data.reading.files import find_files, split_paths
from ringbpt.data.reading.hub import ArrayRecordSource, make_huggingface, make_tfds
from ringbpt.data.reading.sources import FirstExamples, JsonSource, PythonSource, Source, TextSource
from ringbpt.data.reading.tables import ArrowSource, CsvSource, ParquetSource, is_saved_folder, saved_folder

# Formats, and the endings (before .gz or .zst) of the files that have them.
ENDINGS = {
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".md"),
    "array_record": (".array_record", ".arrayrecord"),
    "megatron": (".idx", ".bin"),
}
TEXT_ENDINGS = (*ENDINGS["text"], ".rst", ".tex", ".py", ".html")  # where type=text says that they are text


class Part(NamedTuple):
    """One part of a dataset: what it is, as the flags name it. weight: None where no part has one."""

    kind: str  # a format of files, or the dataset's type
    path: str
    weight: float | None


def parts_of(dataset: DatasetConfig, flag: str) -> list[Part]:
    """The parts of a dataset: those of its path's list, and one where it has no path. Raises UserError."""
    path = getattr(dataset.source, "path", None)
    if path is None or dataset.type in ("python", "huggingface"):
        return [Part(dataset.type, path or "", None)]
    where = f"--{flag}.{dataset.group}.path"
    pieces = split_paths(path, where)
    return [Part(_kind(dataset.type, piece, where), piece, weight) for piece, weight in pieces]


def _kind(kind: str, path: str, where: str) -> str:
    """The format that a path of `type=files` has by its ending, or by what is in the folder."""
    if kind != "files":
        return kind
    folder = user_path(path)
    if (folder / "manifest.json").is_file() or (folder / "summary.json").is_file():
        return "tokens"
    if is_saved_folder(path):
        return "arrow"
    names = [path]
    if folder.is_dir():
        names = [name for _, _, files in os.walk(folder) for name in files]
    kinds = {_ending(name) for name in names} - {None}
    if len(kinds) == 1:
        return kinds.pop() or ""
    what = "has files of " + ", ".join(sorted(map(str, kinds))) if kinds else "has no ending that is known"
    raise UserError(f"{where}={path!r} {what}: say what it is, as in --{where[2:].split('.')[0]}.type=text")


def _ending(name: str) -> str | None:
    """`"a.jsonl.gz"` -> "json"; files of tfds-like names `x.array_record-00000-of-00004` too."""
    base = os.path.basename(name)
    for suffix in (".gz", ".zst"):
        base = base.removesuffix(suffix)
    if ".array_record" in base:
        return "array_record"
    ending = os.path.splitext(base)[1].lower()
    return next((kind for kind, endings in ENDINGS.items() if ending in endings), None)


def make_source(dataset: DatasetConfig, part: Part, cache_dir: Path, flag: str) -> Source:
    """The source of one part; `flag` is the dataset's name on the command line, for error messages."""
    source = _make_source(dataset, part, cache_dir, f"{flag}.{dataset.group}")
    return FirstExamples(source, dataset.max_samples) if dataset.max_samples else source


def _make_source(dataset: DatasetConfig, part: Part, cache_dir: Path, flag: str) -> Source:
    config: Any = dataset.source
    where = f"--{flag}.path"
    match part.kind:
        case "json":
            settings = config if isinstance(config, JsonDatasetConfig) else JsonDatasetConfig()
            path = part.path
            if os.path.isdir(os.path.expanduser(path)) and dataset.type != "json":
                path = os.path.join(path, "**/*.json*")
            return JsonSource(replace(settings, path=path), cache_dir, flag)
        case "python":
            return PythonSource(config, flag)
        case "huggingface":
            return make_huggingface(config, dataset.max_samples, cache_dir, flag)
        case "tfds":
            return make_tfds(config, flag)
        case "csv":
            return CsvSource(part.path, cache_dir, flag)
        case "parquet":
            return ParquetSource(find_files(part.path, where, ENDINGS["parquet"]), cache_dir)
        case "arrow" if is_saved_folder(part.path):
            return ArrowSource(saved_folder(part.path, config.split, f"--{flag}"), cache_dir)
        case "arrow":
            return ArrowSource(find_files(part.path, where, ENDINGS["arrow"]), cache_dir)
        case "array_record":
            return ArrayRecordSource(find_files(part.path, where, ENDINGS["array_record"]), cache_dir)
        case "text":
            names = map(os.path.abspath, find_files(part.path, where, TEXT_ENDINGS))
            return TextSource(Path("/"), names, f"{where}={part.path!r}: no text", cache_dir)
    raise UserError(f"--{flag.partition('.')[0]}.type={dataset.type!r} has no examples: it holds tokens already")
