"""A package that is not installed, told in one line by every program.  The standard library alone is imported here."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import TracebackType

_OURS = ("ladir", "training")
#: what brings a package that not everybody needs
_EXTRAS = {
    "lm_eval": "requirements-eval.txt",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "requirements-serve.txt"),
}


def missing_package(error: BaseException) -> str | None:
    """The line for an import that failed because its package is not installed; None for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package in _OURS or find_spec(package) is not None:
        return None
    if package in _EXTRAS:
        return f"the package {package} is not installed for {sys.executable}: pip install -r {_EXTRAS[package]}"
    return (
        f"the package {package} is not installed for {sys.executable}: run make venv and start with .venv/bin/python, or "
        "pip install -r requirements.txt"
    )


def tell_in_one_line() -> None:
    """From now on this program ends with that line where a package is missing, and with a traceback as ever else."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = missing_package(error)
        if line is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.stderr.write(f"{line}\n")

    sys.excepthook = hook
