"""`python -m mem1_kernels.ppo --config configs/chain.toml`: trains, and says where results are."""

from __future__ import annotations

from mem1_kernels.ppo.config import parse_arguments


def main() -> None:
    """Trains as the command line says."""
    config = parse_arguments()
    # Not before --help and wrong options have been answered: this imports transformers.
    from accelerate import PartialState

    from mem1_kernels.ppo.trainer import end_processes, train

    run = train(config)
    end_processes()
    if not PartialState().is_main_process:
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
