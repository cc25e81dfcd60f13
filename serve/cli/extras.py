"""Parts of the product that want packages of their own: `pip install 'tandem-serve[loadtest]'`."""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Any

from serve.errors import OperatorError

_OURS = ("serve", "deployments", "loadtest")


def loadtest(name: str) -> Any:
    """`module:object` of the package `loadtest`. `serve` stands without it, so that it is looked up when it is asked
    for. Raises OperatorError where a package that it wants is not installed."""
    try:
        return pkgutil.resolve_name(f"loadtest.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(tuple(f"{ours}." for ours in _OURS)):
            raise
        raise absent(error.name) from None


def want(package: str) -> None:
    """Of a package that only another process imports. Raises OperatorError."""
    if importlib.util.find_spec(package) is None:
        raise absent(package)


def absent(package: str) -> OperatorError:
    return OperatorError(f"{package} is not installed: pip install 'tandem-serve[loadtest]'", "extras")
