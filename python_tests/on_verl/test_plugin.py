"""What must be refused is refused by name, in the process that starts Ray, before it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from verl.utils.config import validate_config
from verl.workers.engine import EngineRegistry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

from configs import GRPO, PPO, make_config
from mem1_kernels.verl import plugin
from mem1_kernels.verl.refused import ITEMS, asks_for_mem1, selected

EXAMPLES = Path(__file__).parents[2] / "examples/verl"


def validate(config: object) -> None:
    validate_config(config, use_reference_policy=False, use_critic=False)


def test_everything_is_registered() -> None:
    assert plugin.failure is None
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__module__.endswith("engine")
    assert EngineRegistry.get_engine_cls("value_model", "fsdp").__name__.startswith("Mem1")
    assert get_rollout_class("mem1").__name__ == "ServerAdapter"
    assert get_rollout_replica_class("mem1").__name__ == "Mem1Replica"


def test_a_config_that_fits(folder: Path) -> None:
    validate(make_config(folder, *GRPO))
    validate(make_config(folder, *PPO))


def test_the_items_exist_in_verls_config(folder: Path) -> None:
    """A table of names that verl does not have would refuse nothing."""
    config = make_config(folder, *PPO)
    missing = []
    for item in ITEMS:
        for path in (item.path.replace("*", role) for role in ("actor_rollout_ref", "critic")):
            path = path.replace("actor_rollout_ref.strategy", "actor_rollout_ref.actor.strategy")
            if selected(config, path) is None:
                missing.append(path)
    # This one verl reads too, though its own config leaves it out.
    assert set(missing) == {"actor_rollout_ref.rollout.repetition_penalty"}


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.use_remove_padding=False",
        "critic.model.use_fused_kernels=True",
        "critic.model.use_remove_padding=False",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "algorithm.rollout_correction.bypass_mode=True",
        "trainer.v1.trainer_mode=separate_async",
    ],
)
def test_refused_by_name(folder: Path, override: str) -> None:
    with pytest.raises(ValueError, match=f"^{override.partition('=')[0]}: expected"):
        validate(make_config(folder, *PPO, override))


def test_a_run_without_mem1_is_left_alone(folder: Path) -> None:
    config = make_config(
        folder,
        *GRPO,
        "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
        "actor_rollout_ref.rollout.name=vllm",
        "~actor_rollout_ref.rollout.custom",
        "actor_rollout_ref.rollout.top_p=0.9",
    )
    assert not asks_for_mem1(config)
    validate(config)


def main(folder: Path, *overrides: str, **environment: str) -> str:
    """What verl's own command prints before it ends with an error."""
    script = (
        "import sys; from configs import make_config; from pathlib import Path\n"
        "from verl.utils.config import validate_config\n"
        f"config = make_config(Path({str(folder)!r}), *{list(overrides)!r})\n"
        "validate_config(config, use_reference_policy=False, use_critic=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode, done.stdout
    return done.stderr


def test_a_plugin_that_does_not_load(folder: Path, tmp_path: Path) -> None:
    """verl swallows it; the plugin does not."""
    (tmp_path / "sabotage.py").write_text(
        "import sys; sys.modules['mem1_kernels.verl.hooks.engine'] = None\n"
    )
    said = main(
        folder,
        *GRPO,
        VERL_USE_EXTERNAL_MODULES="cpu_platform,sabotage",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]),
    )
    assert "RuntimeError: mem1_kernels: the config asks for its plugin, which could not" in said


def test_engines_of_verl(folder: Path) -> None:
    said = main(folder, *GRPO, "~ray_kwargs.ray_init.runtime_env.env_vars", VERL_ENGINE_VENDOR="")
    assert "ValueError: VERL_ENGINE_VENDOR: expected 'mem1'" in said


@pytest.mark.parametrize("model", ["7B", "14B"])
@pytest.mark.parametrize("rollout", ["mem1", "vllm"])
@pytest.mark.parametrize("script", ["grpo_1x4_h100.sh", "ppo_4x8_h100.sh"])
def test_the_commands_of_the_examples(
    folder: Path, tmp_path: Path, script: str, rollout: str, model: str
) -> None:
    """Every override is one of verl's, and what they make is not refused."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor override in "$@"; do echo "$override"; done\n')
    fake.chmod(0o755)
    said = subprocess.run(
        ["bash", str(EXAMPLES / script)],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "MODEL": f"Qwen/Qwen2.5-{model}",
            "ROLLOUT": rollout,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    module, *overrides = said.stdout.split()[1:]
    assert module == "verl.trainer.main_ppo"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    config.actor_rollout_ref.model.path = config.critic.model.path = str(folder)
    validate(config)
    length = config.data.max_prompt_length + config.data.max_response_length
    assert length <= config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu


def test_nothing_heavy_where_nobody_asks() -> None:
    """In a process that trains something else."""
    script = (
        "import sys, verl\n"
        "assert 'mem1_kernels.verl.plugin' in sys.modules\n"
        "assert 'mem1_kernels.verl.hooks.register' not in sys.modules\n"
    )
    environment = {**os.environ, "VERL_ENGINE_VENDOR": "nvidia"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
