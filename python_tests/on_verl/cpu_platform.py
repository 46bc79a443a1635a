"""A CPU platform for verl, so that its own trainer runs in tests: `VERL_PLATFORM=cpu` and
`VERL_USE_EXTERNAL_MODULES=cpu_platform`, in every process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed import fsdp
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Device:
    """torch.cpu, with what verl asks of torch.cuda."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get_device_name":
            return lambda *args: "CPU"
        if name == "mem_get_info":
            return lambda *args: (0, 0)
        return getattr(torch.cpu, name, lambda *args, **kwargs: 0)


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    """One logical device per process."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _Device()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"  # logical ones: ray.init(num_gpus=...)

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


def _one_backend(init: Any) -> Any:
    """verl asks for "cpu:gloo,cpu:gloo", which torch refuses."""

    def init_process_group(backend: str | None = None, **options: Any) -> Any:
        return init(backend="gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **options)

    return init_process_group


class _Pageable(fsdp.CPUOffloadPolicy):
    """The reference is offloaded to pinned memory, which needs an accelerator."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(pin_memory=False)


torch.distributed.init_process_group = _one_backend(torch.distributed.init_process_group)
fsdp.CPUOffloadPolicy = _Pageable
