"""The definition that every other backend is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import csikernels


def reference(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` on the reference backend, whatever is in force."""
    with csikernels.use_backend("reference"):
        return function(*args, **kwargs)
