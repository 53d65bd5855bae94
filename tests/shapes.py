"""Checks the jaxtyping annotations of the package by beartype, while its tests run (see conftest.py).

Functions whose annotations name the shape of an array are wrapped when their module is imported. All others,
and processes that tests start, run as they are. `pytest --no-shapes` turns it off.
"""

import functools
import sys
import typing
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "worldvla"


def install() -> None:
    assert PACKAGE not in sys.modules, f"{PACKAGE} is imported already: install the check before"
    sys.meta_path.insert(0, _Finder())


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.partition(".")[0] == PACKAGE else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, FunctionType):
                setattr(module, name, checked(value))
            elif isinstance(value, type):
                _check_methods(value)


def _check_methods(cls: type) -> None:
    for name, value in list(vars(cls).items()):
        if isinstance(value, FunctionType):
            setattr(cls, name, checked(value))
        elif isinstance(value, classmethod | staticmethod):
            setattr(cls, name, type(value)(checked(value.__func__)))
        elif isinstance(value, property) and isinstance(value.fget, FunctionType):
            setattr(cls, name, property(checked(value.fget)))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its annotations of shapes enforced, or itself where it has none."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not shapes:
        return function
    plain = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    plain.__kwdefaults__, plain.__annotations__ = function.__kwdefaults__, shapes
    plain.__qualname__, plain.__module__ = function.__qualname__, function.__module__
    strict = jaxtyped(plain, typechecker=beartype)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # torch.compile traces the function itself: it cannot see through the check.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return strict(*args, **kwargs)

    return call


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))
