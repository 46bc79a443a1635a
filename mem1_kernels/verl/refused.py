"""The config items under which verl would train something else than what was sampled, or could not
tell. One table: an item, what it must be, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mem1_kernels.verl.settings import Settings

AGENT_LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
ROLLOUT = "actor_rollout_ref.rollout.name"
OPTIONS = "actor_rollout_ref.rollout.custom.mem1"
VENDOR = "VERL_ENGINE_VENDOR"


class Item(NamedTuple):
    """What a config item must be.

    Args:
        path: the item; `*` stands for each of actor and critic, where the run has a critic.
        holds: whether a value is one that may be trained with.
        expected: the same in words.
        reason: why others are refused.
        only: the rollout that the item matters to; "": all.
    """

    path: str
    holds: Callable[[Any], bool]
    expected: str
    reason: str
    only: str = ""


def _is(*values: Any) -> Callable[[Any], bool]:
    """Also true of an item that is missing or None: verl's default is right then."""
    return lambda value: value is None or value in values


_OFF = _is(False)
_FORWARD = "it replaces the model's forward pass by one that drops the plan without an error"
_FSDP = "the plan is handed on by the engines of FSDP only"
_TRUNCATED = "the log-probs of truncated or penalised sampling are not those that training computes"
_OUTPUTS = "its outputs are laid out for rows whose tokens are predicted by the one before"
_SINGLE = "the replica `mem1` holds a whole model in one process"

ITEMS = (
    Item(AGENT_LOOP, lambda value: value == "mem1", "mem1", "no other loop brings a plan along"),
    Item("*.model.use_fused_kernels", _OFF, "False", _FORWARD),
    Item("*.model.use_remove_padding", _is(True), "True", "padded batches carry no plan"),
    Item("*.model.tiled_mlp.enabled", _OFF, "False", "not tried beside a plan"),
    Item("*.model.mtp.enable", _OFF, "False", "its heads predict past the ends of branches"),
    Item("*.strategy", _is("fsdp", "fsdp2"), "fsdp or fsdp2", _FSDP),
    Item("actor_rollout_ref.ref.strategy", _is("fsdp", "fsdp2"), "fsdp or fsdp2", _FSDP),
    Item("actor_rollout_ref.actor.use_prefix_grouper", _OFF, "False", _FORWARD),
    Item("actor_rollout_ref.rollout.calculate_log_probs", _is(True), "True", "nothing to check by"),
    Item("actor_rollout_ref.rollout.top_p", _is(1, 1.0), "1", _TRUNCATED),
    Item("actor_rollout_ref.rollout.top_k", _is(-1, 0), "-1", _TRUNCATED),
    Item("actor_rollout_ref.rollout.repetition_penalty", _is(1, 1.0), "1", _TRUNCATED),
    Item("actor_rollout_ref.rollout.tensor_model_parallel_size", _is(1), "1", _SINGLE, "mem1"),
    Item("actor_rollout_ref.rollout.data_parallel_size", _is(1), "1", _SINGLE, "mem1"),
    Item("actor_rollout_ref.rollout.pipeline_model_parallel_size", _is(1), "1", _SINGLE, "mem1"),
    Item("actor_rollout_ref.rollout.val_kwargs.top_p", _is(1, 1.0), "1", _TRUNCATED, "mem1"),
    Item("actor_rollout_ref.rollout.val_kwargs.top_k", _is(-1, 0), "-1", _TRUNCATED, "mem1"),
    Item(
        "algorithm.rollout_correction.bypass_mode",
        _OFF,
        "False",
        "it takes the rollout's log-probs for the actor's, so nothing is left to check",
    ),
    Item("distillation.enabled", _OFF, "False", _OUTPUTS),
    Item("trainer.use_v1", _is(True), "True", "verl's older trainer hands no plan on"),
    Item(
        "trainer.v1.trainer_mode",
        _is("sync"),
        "sync",
        "an episode would be written under several steps' weights, and the check would take that "
        "for an error",
    ),
)
"""What is refused, in the order in which it is looked at."""


def asks_for_mem1(config: Any) -> bool:
    """Whether a config of verl is meant for this plugin.

    >>> asks_for_mem1({"actor_rollout_ref": {"rollout": {"name": "vllm"}}})
    False
    """
    return (
        selected(config, AGENT_LOOP) == "mem1"
        or selected(config, ROLLOUT) == "mem1"
        or selected(config, OPTIONS) is not None
    )


def selected(config: Any, path: str) -> Any:
    """The item of a nested mapping at a dotted path; None where there is none.

    >>> selected({"a": {"b": 3}}, "a.b"), selected({"a": None}, "a.b")
    (3, None)
    """
    for name in path.split("."):
        if not isinstance(config, Mapping) and not hasattr(config, "get"):
            return None
        config = config.get(name)
    return config


def check_config(config: Any, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a config that verl can train exactly.

    Args:
        config: verl's, or a dict of that form.
        environment: variables of the process that starts Ray.

    Raises:
        ValueError: an item of `ITEMS`, by its name and with the reason; workers whose engines are
            not this plugin's; options that `Settings` refuses.
    """
    # Not at the top: every process of verl imports this module, whatever it trains.
    from mem1_kernels.verl.settings import Settings

    backend = selected(config, ROLLOUT)
    roles = ["actor"] if not _has_critic(config) else ["actor", "critic"]
    for item in ITEMS:
        if item.only and item.only != backend:
            continue
        for path in _paths(item.path, roles):
            value = selected(config, path)
            if not item.holds(value):
                raise ValueError(f"{path}: expected {item.expected}, got {value!r}: {item.reason}")
    path = f"ray_kwargs.ray_init.runtime_env.env_vars.{VENDOR}"
    vendor = selected(config, path) or environment.get(VENDOR)
    if vendor != "mem1":
        raise ValueError(
            f"{VENDOR}: expected 'mem1' in the workers' environment (+{path}=mem1), got "
            f"{vendor!r}: verl's own engines drop the plan without an error, and actor, reference "
            "and critic would be causal"
        )
    options = selected(config, OPTIONS)
    settings = Settings.read(None if options is None else dict(options.items()))
    settings.form(str(backend))
    return settings


def _paths(path: str, roles: list[str]) -> list[str]:
    """`path`, or one for each role, whose models stand at different places."""
    if not path.startswith("*."):
        return [path]
    rest = path.removeprefix("*.")
    actor = "actor_rollout_ref" if rest.startswith("model.") else "actor_rollout_ref.actor"
    return [f"{actor if role == 'actor' else 'critic'}.{rest}" for role in roles]


def _has_critic(config: Any) -> bool:
    enabled = selected(config, "critic.enable")
    gae = selected(config, "algorithm.adv_estimator") == "gae"
    return gae if enabled is None else bool(enabled)
