"""The alphabet, checked: a parameter whose name ends in letters has a dim a letter, and one size a letter in a call.

`q_BTNH` has four dims; in a call of `f(q_BTNH, k_BSKH)` both have the same B and H. conftest.py installs the check
around the public functions of attention, model, objectives and data, for every test there is.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable

ROOMS = tuple(f"ringbpt.{room}" for room in ("attention", "model", "objectives", "data"))
LETTERS = set("BTSNKGHDFVLEPRAQXh")  # X: the experts of a token; h: H/2


def letters_of(name: str) -> str:
    """`q_BTNH` -> "BTNH"; "" for a name that ends in no letters of the alphabet, or in more dims than it names."""
    _, underscore, suffix = name.rpartition("_")
    return suffix if underscore and set(suffix) <= LETTERS and suffix != suffix.lower() else ""


def checked(function: Callable) -> Callable:
    """The function, which raises TypeError for an array whose dims are not those of its parameter's name."""
    signature = inspect.signature(function)
    suffixes = {name: letters for name in signature.parameters if (letters := letters_of(name))}
    if not suffixes:
        return function

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        sizes: dict[str, int] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            shape = getattr(value, "shape", None)
            if name not in suffixes or shape is None:
                continue
            if len(shape) != len(suffixes[name]):
                raise TypeError(f"{function.__qualname__}: {name} has the shape {shape}")
            for letter, size in zip(suffixes[name], shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise TypeError(
                        f"{function.__qualname__}: {name} has the shape {shape}, and {letter}={sizes[letter]}"
                    )
        return function(*args, **kwargs)

    return wrapper


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        for owner in (module, *(value for value in own if inspect.isclass(value))):
            for name, value in list(vars(owner).items()):
                if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                    setattr(owner, name, checked(value))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if not name.startswith(ROOMS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None and spec.origin:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Before the first import of ringbpt."""
    assert not any(name.startswith(ROOMS) for name in sys.modules)
    sys.meta_path.insert(0, _Finder())
