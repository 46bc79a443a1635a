"""Loads the compiled module `mem1_kernels._C`, where there is one that fits the torch at hand."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import torch

REBUILD = "in a clone or sdist, pip install --no-build-isolation --no-deps --force-reinstall ."


def built_against(path: str | Path) -> str | None:
    """The torch that the compiled module at `path` was built against, such as "2.13.0".

    It is read from the file's bytes: loading a module under another torch may crash. None: the file
    does not say.
    """
    found = re.search(
        rb"mem1_kernels\._C is built against torch ([0-9.]+)", Path(path).read_bytes()
    )
    return None if found is None else found.group(1).decode()


def same_minor(one: str, other: str) -> bool:
    """Whether two versions of torch share their C++ interface: it changes with the minor version.

    >>> same_minor("2.13.0", "2.13.1+cu130"), same_minor("2.1.0", "2.13.0")
    (True, False)
    """
    return one.split(".")[:2] == other.split(".")[:2]


def load() -> str | None:
    """Loads `mem1_kernels._C`, which registers its kernels. torch must be imported before.

    Returns:
        None where it is loaded; else why it is not: "no extension built", or for which torch.

    Warns:
        RuntimeWarning: the module was built against another minor version of torch. It is not
            loaded, and CPU ops run in plain torch.

    Raises:
        ImportError: the module does not say what it was built against, or was built against this
            torch and yet does not load.
    """
    spec = importlib.util.find_spec("mem1_kernels._C")
    if spec is None or spec.origin is None:
        return "no extension built"
    here = torch.__version__
    built = built_against(spec.origin)
    if built is not None and not same_minor(built, here):
        warnings.warn(
            f"mem1_kernels._C was built against torch {built} and is not loaded under torch "
            f"{here}: CPU ops run in plain torch. To build it again: {REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"extension built for torch {built}"
    try:
        if built is None:
            raise ImportError(f"{spec.origin} does not say which torch it was built against")
        importlib.import_module("mem1_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"mem1_kernels._C does not load under torch {here}; build it again: {REBUILD}"
        ) from error
    return None
