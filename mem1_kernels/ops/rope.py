"""Rotary positions as a pure rotation: by how much each pair of a key turns per position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, eq=False)
class Rope:
    """The frequencies by which keys were rotated, for rotating them again by a difference.

    Only angles: a magnitude factor (YaRN's attention factor) is in the cached keys already, and a
    second rotation must not apply it again. Frequencies must not depend on the length of the
    sequence, so "dynamic" and "longrope" scaling cannot be had. With several position axes (mRoPE)
    a key can be moved if all its axes shift by the same number, and then its frequencies are the
    plain ones.

    Args:
        inv_freq: float32 or float64 `[rotary_dim / 2]`, radians per position, as the model's rotary
            embedding holds it; or a sequence of such tensors, one per layer (empty: its keys
            are not rotated). Elements of a key from `rotary_dim` on do not turn.
        layout: "half": element `i` turns with `i + rotary_dim / 2` (Llama, Qwen, Gemma);
            "interleaved": `2 i` with `2 i + 1` (GLM, GPT-J).

    Attributes:
        steps: what the kernels read, int64 `[rotary_dim / 2]`, one tensor or one per layer.

    Raises:
        TypeError: a frequency tensor that is not float32 or float64.
        ValueError: a shape, a layout or a frequency that is not as above.

    >>> Rope(1.0 / 10_000 ** (torch.arange(0, 8, 2) / 8)).steps[0].shape
    torch.Size([4])
    """

    inv_freq: Tensor | Sequence[Tensor]
    layout: str = "half"
    # The frequencies, in units of 2^-64 turns per position, whole turns left out: an int64
    # product with a position wraps at whole turns, so angles stay exact however far a key moves.
    steps: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {self.layout!r}")
        tensors = (self.inv_freq,) if isinstance(self.inv_freq, Tensor) else tuple(self.inv_freq)
        if not tensors:
            raise ValueError("inv_freq: expected at least one tensor, got none")
        for x in tensors:
            if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"inv_freq: expected float32 or float64 tensors, got {got}")
            if x.dim() != 1:
                raise ValueError(f"inv_freq: expected [rotary_dim / 2], got {list(x.shape)}")
            if not x.isfinite().all():
                raise ValueError("inv_freq: expected finite frequencies")
        object.__setattr__(self, "steps", [_turn_steps(x) for x in tensors])

    @classmethod
    def from_parameters(
        cls,
        parameters: Mapping[str, Any],
        head_dim: int,
        *,
        layout: str = "half",
        device: torch.device | str | None = None,
    ) -> Rope:
        """From one kind of layer's `config.rope_parameters`, as Hugging Face models have it.

        Knows the `rope_type`s "default", "mrope" (the same: several position axes, which must all
        shift by one number), "linear", "llama3" and "yarn", computed in float32 as the models do.
        Where a model is at hand, its own `inv_freq` buffer is the safer source.

        Args:
            parameters: with `rope_theta`, `rope_type` ("default" if left out), perhaps
                `partial_rotary_factor`, and what the type needs.
            head_dim: elements of a key.

        Raises:
            ValueError: a type that is not a rotation by a fixed angle per position ("dynamic",
                "longrope"), one that is not known, or a parameter that is missing.

        Source: Llama 3.1's scaling; YaRN, arXiv 2309.00071, section 3.2.

        >>> Rope.from_parameters({"rope_theta": 10_000.0}, 4).inv_freq
        tensor([1.0000, 0.0100])
        """
        if "rope_theta" not in parameters:
            nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
            hint = f"; it holds {nested}: pass one of them" if nested else ""
            raise ValueError(f"parameters: rope_theta is missing{hint}")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number of rotated elements, got {rotary_dim}"
            )
        try:
            inv_freq = _inv_freq(kind, parameters, rotary_dim)
        except KeyError as error:
            raise ValueError(f"parameters: {kind} needs {error.args[0]}, got none") from error
        return cls(inv_freq.to(device), layout)


def _turn_steps(inv_freq: Tensor) -> Tensor:
    turns = inv_freq.double() / (2 * math.pi)
    turns = turns - turns.round()
    # The largest double under 2^63 stands for half a turn.
    return (turns * 2.0**64).clamp(-(2.0**63), 2.0**63 - 1024).to(torch.int64)


def _inv_freq(kind: str, parameters: Mapping[str, Any], rotary_dim: int) -> Tensor:
    base = parameters["rope_theta"]
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    inv_freq = 1.0 / base**exponent
    if kind in ("default", "mrope"):
        return inv_freq
    if kind == "linear":
        return inv_freq / parameters["factor"]
    if kind == "llama3":
        return _llama3(inv_freq, parameters)
    if kind == "yarn":
        return _yarn(base, exponent, parameters, rotary_dim)
    raise ValueError(
        f"parameters: rope_type {kind!r} is not a known rotation by a fixed angle per position"
        "; known: default, mrope, linear, llama3, yarn (a fixed inv_freq can be given to Rope "
        "itself)"
    )


def _llama3(inv_freq: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Long waves slow down by `factor`, short ones stay, those between are blended."""
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    waves_in_context = context / (2 * math.pi / inv_freq)
    keep = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq


def _yarn(base: float, exponent: Tensor, parameters: Mapping[str, Any], rotary_dim: int) -> Tensor:
    """Pairs that turn often within the trained context stay, those that turn rarely slow down."""
    context = parameters["original_max_position_embeddings"]
    factor = parameters["factor"]

    def pair_with(turns: float) -> float:
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with(parameters.get("beta_fast") or 32)
    high = pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    pair = torch.arange(rotary_dim // 2, dtype=torch.float32)
    keep = 1 - ((pair - low) / width).clamp(0, 1)
    wavelength = base**exponent
    return (1 / (factor * wavelength)) * (1 - keep) + (1 / wavelength) * keep
