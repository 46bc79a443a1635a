"""`python -m mem1_kernels.ppo --config configs/chain.toml`: trains, and says where results are.

Exit codes: 0, 2 for options that do not fit, 1 for other errors, 130 after Ctrl-C, 143 after
SIGTERM. An error that names an option, a file or a missing package is one line; others have their
traceback.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from mem1_kernels.ppo.config import Config, options, parse_arguments


def is_for_the_user(error: Exception) -> bool:
    """Whether an error says all in its message: it is about an option, a file or a package."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and "is not installed" in str(error):
        return True
    named = re.match(r"\w+(, \w+)*(?=: )", str(error))
    known = {option.name for option in options()}
    return named is not None and known.issuperset(named[0].split(", "))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says."""
    config = parse_arguments(arguments)
    try:
        _train(config)
    except KeyboardInterrupt:
        print("Ctrl-C: stopped at once", file=sys.stderr)
        sys.exit(130)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if not is_for_the_user(error):
            raise
        print(f"python -m mem1_kernels.ppo: error: {error}", file=sys.stderr)
        sys.exit(1)


def _train(config: Config) -> None:
    # Not before --help and wrong options have been answered: this imports transformers.
    from accelerate import PartialState

    from mem1_kernels.ppo.trainer import Stopped, end_processes, train

    run, why = None, ""
    try:
        run = train(config)
    except Stopped as stopped:
        code, why = stopped.code, str(stopped)
    end_processes()  # here, where no traceback holds the model any more
    is_main = PartialState().is_main_process
    if run is None:
        if is_main:
            print(why, file=sys.stderr)
        sys.exit(code)
    if not is_main:
        return
    if run.rewards:
        print(f"reward {run.rewards[0]:.3f} -> {run.rewards[-1]:.3f} over {len(run.rewards)} steps")
    for row in run.evaluation:
        print(
            f"size {row['size']:3}: reward {row['reward']:.3f}, peak context "
            f"{row['peak_context']}, whole trajectory {row['total_tokens']:.0f} tokens"
        )
    print(f"{config.out}: metrics.jsonl, curve.png, policy/")


if __name__ == "__main__":
    main()
