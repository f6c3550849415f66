"""Triton's interpreter in half the time: what it looks up again and again is looked up once.

The interpreter patches triton.language for every function that a kernel calls, and lists all its members each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


def remember_lookups() -> None:
    """Patch Triton's interpreter, which must not have run a kernel yet."""
    import triton.language as tl
    from triton.runtime import interpreter

    is_builtin = tl.core.is_builtin
    patch_language, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    @cache
    def builtins_of(package: Any) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(package) if is_builtin(member))

    @cache
    def languages_of(function: Callable[..., Any]) -> tuple[Any, ...]:
        return tuple(x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # not patched yet
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_language_once(function: Callable[..., Any]) -> Any:
        languages = languages_of(function)
        if not languages or any(is_builtin(language.load) for language in languages):
            return patch_language(function)
        return interpreter._LangPatchScope()

    def numpy_dtype_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        builtins_of(package)  # while none is patched
    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = patch_language_once
    interpreter._get_np_dtype = numpy_dtype_once
