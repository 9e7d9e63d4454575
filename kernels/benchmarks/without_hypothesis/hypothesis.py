# SPDX-License-Identifier: Apache-2.0
"""Stands in for hypothesis on hosts without it, for `run_on_gpu.sh` alone: its tests are collected, and skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


class _Anything(ModuleType):
    """Strategies and phases, whatever is asked of them while tests are collected."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


Phase = strategies = _Anything("hypothesis.strategies")
sys.modules["hypothesis.strategies"] = strategies


def settings(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda test: test


def given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    def skipped(test: Any) -> Any:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def stub() -> None: ...

        stub.__name__ = test.__name__
        return stub

    return skipped
