from typing import TypedDict

class BuildInfo(TypedDict):
    sources: list[str]
    ops: dict[str, list[str]]
    cuda_archs: list[str]
    compiler: str
    torch: str
    simd_compiled: list[str]
    simd: str
    simd_reason: str
    openmp: bool

def build_info() -> BuildInfo: ...
