"""Whether an installed package works: `python smoke.py`, or `python smoke.py WHEEL_OR_SDIST`.

Without an argument it runs the ops of the `mem1_kernels` that is installed. With one it first
installs that file into a new virtual environment, which sees this one's packages but no checkout,
and runs there. It needs torch and nothing else, and prints what it used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="wheel or sdist to install first")
    parser.add_argument("--plain", action="store_true", help="expect no compiled extension")
    options = parser.parse_args()
    if options.file is None:
        check(extension=not options.plain)
    else:
        install_and_check(options.file.resolve(strict=True), options.plain)


def check(extension: bool) -> None:
    """Attention and its gradient, and a pruned cache, against the dense mask."""
    import torch
    import torch.nn.functional as F

    import mem1_kernels
    from mem1_kernels import BlockPlan, Segment, Trajectory, cached_attention, info, prune_kv_
    from mem1_kernels.ops import _library

    print(info.report())
    print(f"mem1_kernels is imported from {Path(mem1_kernels.__file__).parent}")
    assert _library.HAS_EXTENSION == extension, f"compiled extension: {_library.OBSTACLE}"

    torch.manual_seed(0)
    segments = [Segment("prompt", 150)]
    for turn in (1, 2, 3):
        segments += [Segment("state", 20, turn), Segment("action", 9, turn)]
        segments += [Segment("info", 120, turn)]
    trajectory = Trajectory(segments)
    query, key, value = (
        torch.randn(1, trajectory.num_tokens, heads, 32, requires_grad=True) for heads in (4, 2, 2)
    )

    def dense(query, mask):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2)

    expected = dense(query, mem1_kernels.visible(trajectory.expiry, trajectory.floor))
    got = mem1_kernels.trajectory_attention(query, key, value, plan=BlockPlan.of(trajectory))
    torch.testing.assert_close(got, expected)
    gradients = (
        torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (got, expected)
    )
    torch.testing.assert_close(*gradients)

    last = trajectory.num_tokens - 1
    cache = [x.detach().transpose(1, 2).contiguous() for x in (key, value)]
    lengths = torch.tensor([trajectory.num_tokens], dtype=torch.int32)
    prune_kv_([cache[0]], [cache[1]], lengths, trajectory.expiry[None] > last)
    assert lengths.item() < trajectory.num_tokens
    with torch.no_grad():
        out = cached_attention(query[:, last:], *cache, lengths)
    torch.testing.assert_close(out, expected[:, last:].detach())
    print("attention, its gradient and the pruned cache agree with the dense mask")


def install_and_check(file: Path, plain: bool) -> None:
    """Installs `file` into a new environment and runs this script there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=True)
        python = Path(folder, "bin", "python")
        site = sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder})
        # Behind its own: the packages at hand, but not their .pth files, and so no checkout.
        shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        Path(site, "shared.pth").write_text("\n".join(shared) + "\n")
        # ninja lies beside the interpreter that has it.
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": scripts}
        environment.pop("PYTHONPATH", None)
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        run = [str(python), "-m", "pip", "install", "--quiet", *options, str(file)]
        subprocess.run(run, cwd=folder, env=environment, check=True)
        program = [str(python), "-I", __file__, *(["--plain"] if plain else [])]
        result = subprocess.run(
            program, cwd=folder, env=environment, check=True, capture_output=True, text=True
        )
        print(result.stdout)
        assert f"imported from {Path(site).resolve()}" in result.stdout, "it ran another package"


if __name__ == "__main__":
    main()
