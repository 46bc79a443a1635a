"""Starts vLLM's OpenAI-compatible server with sessions that can drop tokens.

    python -m mem1_kernels.vllm.serve MODEL [options of vLLM]

The server has all routes of vLLM's own, and those of `mem1_kernels.vllm.endpoint`.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence


def arguments(model: str, options: Sequence[str], device: str) -> list[str]:
    """The command line of vLLM's server.

    >>> arguments("m", ["--port", "9"], "cpu")[:4]
    ['--model', 'm', '--scheduler-cls', 'mem1_kernels.vllm.scheduler.session_scheduler']
    """
    from mem1_kernels.vllm.engine import engine_options

    chosen = [
        f"--{name.replace('_', '-')} {value}" for name, value in engine_options(device).items()
    ]
    chosen.sort(key=lambda option: not option.startswith("--scheduler"))
    return ["--model", model, *(word for option in chosen for word in option.split()), *options]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, "mem1"]))
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "cuda"
    sys.argv = ["vllm", *arguments(sys.argv[1], sys.argv[2:], device)]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
