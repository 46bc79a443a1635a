"""Puts the plugin into verl, and its checks before verl's own.

verl loads it at the end of `import verl`, in every process, and swallows what a plugin raises, at
log level DEBUG; it would then train without it. So nothing is raised here. What went wrong is
raised by name once a config asks for this plugin. Until then nothing heavy is imported.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from mem1_kernels.verl.refused import VENDOR, asks_for_mem1, check_config

VERSION = "0.9."
"""The versions of verl whose hooks are known."""

failure: BaseException | None = None
"""Why the plugin could not be loaded in this process, or None."""


def load() -> None:
    """Puts `check` before verl's `validate_config`, which runs in the process that starts Ray, and
    registers the plugin in workers that are to use it."""
    module: Any = importlib.import_module("verl.utils.config")
    module.validate_config = checked(module.validate_config)
    if os.environ.get(VENDOR) == "mem1":
        register()


def register() -> None:
    """Registers the engines, the agent loop and the rollout replica, and puts checks into verl's
    trainer; once per process. An error becomes `failure`."""
    global failure
    if failure is not None:
        return
    try:
        verl = importlib.import_module("verl")
        if not verl.__version__.startswith(VERSION):
            raise ImportError(f"verl: expected version {VERSION}x, got {verl.__version__}")
        importlib.import_module("mem1_kernels.verl.hooks.register")
    except Exception as error:  # raised by `check` once a config asks for the plugin
        failure = error


def check(config: Any) -> None:
    """Raises what stands against training under this config, if it asks for this plugin.

    Raises:
        ValueError: as `check_config`.
        RuntimeError: the plugin cannot be loaded.
    """
    if not asks_for_mem1(config):
        return
    check_config(config)
    register()
    if failure is not None:
        raise RuntimeError(
            "mem1_kernels: the config asks for its plugin, which could not be loaded "
            f"({type(failure).__name__}: {failure})"
        ) from failure


def checked(validate: Any) -> Any:
    """verl's `validate_config` behind `check`."""

    @functools.wraps(validate)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        check(config)
        return validate(config, *args, **kwargs)

    return validate_config
