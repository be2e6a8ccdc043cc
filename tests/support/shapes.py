"""Shapes in annotations are checked under pytest: by beartype, where an argument or a result has one, and nowhere else.

Tests may hand a stand-in to any function; a tensor of a wrong shape or kind of numbers they may not.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any, get_args

import torch
from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

Function = Callable[..., Any]


def has_shape(hint: Any) -> bool:
    """Whether an annotation is, or holds, one such as `Float[Tensor, "b 3 h w"]`."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(has_shape(part) for part in get_args(hint))


def _beartype_shapes(function: Function) -> Function:
    every = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in every.items() if has_shape(hint)}
    try:
        return beartype(function)
    finally:
        function.__annotations__ = every


def checked(function: Function) -> Function:
    """The function with its shapes checked at every call; what torch.compile traces is the function itself."""
    with_checks = jaxtyped(function, typechecker=_beartype_shapes)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (function if torch.compiler.is_compiling() else with_checks)(*args, **options)

    return call


def check_shapes_of(holder: ModuleType | type, module: str) -> None:
    """Put checks around the functions and methods of a module that have shapes in their annotations."""
    for name, value in list(vars(holder).items()):
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and function.__module__ == module:
            if any(has_shape(hint) for hint in function.__annotations__.values()):
                kind = type(value) if isinstance(value, (staticmethod, classmethod)) else lambda plain: plain
                setattr(holder, name, kind(checked(function)))
        elif isinstance(value, type) and value.__module__ == module and holder is not value:
            check_shapes_of(value, module)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        check_shapes_of(module, module.__name__)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: Sequence[str]):
        self._packages = tuple(f"{package}." for package in packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(self._packages):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(packages: Sequence[str]) -> None:
    """Check the modules of these packages that are imported from here on, in this process and in forks of it."""
    sys.meta_path.insert(0, _Finder(packages))
