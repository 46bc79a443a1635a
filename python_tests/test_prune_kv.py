"""prune_kv_ and prune_paged_kv_: bytes against the reference, and what they promise by itself."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from kv_layouts import (
    DTYPES,
    PAGED_KINDS,
    STORAGES,
    assert_same_bytes,
    make_layer,
    make_pages,
    paged_rows,
    random_bytes,
    random_rows,
)
from torch import Tensor

from mem1_kernels.ops import reference
from mem1_kernels.ops._library import implementations
from mem1_kernels.ops._memory import check_disjoint
from mem1_kernels.ops.prune_kv import prune_kv_, prune_paged_kv_
from mem1_kernels.ops.rope import Rope


def check_against_reference(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    keep: Tensor,
    slots: list[Tensor],
    ordered: bool,
) -> None:
    """Whole tensors, so survivors, stale tails and slots past the length alike."""
    expected_keys, expected_values, expected_slots = (
        [x.clone() for x in xs] for xs in (keys, values, slots)
    )
    expected_lengths, kept = lengths.clone(), keep.clone()
    reference.prune_kv_(
        expected_keys, expected_values, expected_lengths, keep, expected_slots, ordered, None, [],
        False,
    )  # fmt: skip
    prune_kv_(keys, values, lengths, keep, slots=slots, ordered=ordered)
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(keep, kept)
    for name, got, expected in (
        ("keys", keys, expected_keys),
        ("values", values, expected_values),
        ("slots", slots, expected_slots),
    ):
        for layer, (x, y) in enumerate(zip(got, expected, strict=True)):
            assert_same_bytes(x, y, f"{name}[{layer}]")


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_the_reference(dtype: torch.dtype, storage: str, ordered: bool) -> None:
    for seed, (batch, capacity) in enumerate([(1, 1), (3, 31), (2, 128), (4, 129), (2, 515)]):
        layers = [
            make_layer(storage, batch, heads, capacity, dim, dtype, seed)
            for heads, dim in [(2, 16), (1, 24), (3, 5)]
        ]
        slots = [
            random_bytes((batch, capacity), dtype, seed + 2),
            random_bytes((batch, capacity), torch.int64, seed + 3),
            random_bytes((batch, 2, capacity), torch.int32, seed + 4)[:, 1],
            random_bytes((capacity, batch), torch.int16, seed + 5).T,
        ]
        lengths, keep = random_rows(batch, capacity, seed, (0.5, 0.1, 0.9)[seed % 3])
        keys, values = (list(xs) for xs in zip(*layers, strict=True))
        check_against_reference(keys, values, lengths, keep, slots, ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize(
    "rows",
    [
        "keep none",
        "keep all",
        "keep the first",
        "keep the last",
        "keep every other",
        "drop a middle run",
        "drop the front",
        "drop the end",
    ],
)
def test_special_keeps(rows: str, ordered: bool) -> None:
    batch, capacity = 3, 300
    lengths = torch.tensor([300, 0, 257], dtype=torch.int32)
    slot = torch.arange(capacity).expand(batch, capacity)
    keep = {
        "keep none": slot < 0,
        "keep all": slot >= 0,
        "keep the first": slot == 0,
        "keep the last": slot == lengths[:, None] - 1,
        "keep every other": slot % 2 == 1,
        "drop a middle run": (slot < 33) | (slot > 200),
        "drop the front": slot >= 96,
        "drop the end": slot < 160,
    }[rows].contiguous()
    keys, values = make_layer("head major", batch, 2, capacity, 8, torch.float16, 0)
    check_against_reference([keys], [values], lengths, keep, [slot.clone()], ordered)


def test_one_row_dies_and_another_is_whole() -> None:
    lengths = torch.tensor([40, 40, 40], dtype=torch.int32)
    keep = torch.tensor([False, True, False])[:, None].repeat(1, 40)
    keep[2, ::3] = True
    keys, values = make_layer("slot major", 3, 2, 40, 8, torch.float32, 0)
    check_against_reference([keys], [values], lengths, keep, [], False)
    assert lengths.tolist() == [0, 40, 14]


def test_lengths_far_below_a_large_capacity_read_no_further() -> None:
    capacity = 70_000
    keys, values = make_layer("head major", 2, 1, capacity, 4, torch.bfloat16, 0)
    lengths = torch.tensor([37, 1], dtype=torch.int32)
    _, keep = random_rows(2, capacity, 0, 0.5)
    check_against_reference([keys], [values], lengths, keep, [], False)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
def test_survivors_by_their_ids(ordered: bool, seed: int) -> None:
    """Without the reference: who is where, and how few slots changed."""
    batch, capacity = 4, 200
    lengths, keep = random_rows(batch, capacity, seed, (seed % 5 + 1) / 6)
    ids = torch.arange(batch * capacity).reshape(batch, capacity)
    before, old_lengths = ids.clone(), lengths.clone()
    keys = ids[:, None, :, None].float().repeat(1, 2, 1, 3)
    values = -keys
    prune_kv_([keys], [values], lengths, keep, slots=[ids], ordered=ordered)
    for b in range(batch):
        kept = before[b, : old_lengths[b]][keep[b, : old_lengths[b]]]
        n = len(kept)
        assert lengths[b] == n
        now = ids[b, :n]
        assert torch.equal(now if ordered else now.sort().values, kept)
        assert torch.equal(ids[b, n:], before[b, n:]), "a slot behind the survivors was written"
        if not ordered:
            moved = (now != before[b, :n]).sum()
            assert moved == (~keep[b, :n]).sum(), "a survivor moved that need not"
        for head in range(2):
            for column in range(3):
                assert torch.equal(keys[b, head, :n, column], now.float())
                assert torch.equal(values[b, head, :n, column], -now.float())


def test_attention_over_what_is_left_is_attention_over_the_survivors() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 64, 16, generator=generator).double() for _ in range(2))
    query = torch.randn(1, 2, 1, 16, generator=generator).double()
    lengths, keep = torch.tensor([50], dtype=torch.int32), torch.rand(1, 64) < 0.4
    kept = keep[0].nonzero()[:, 0]
    kept = kept[kept < 50]
    keys[:, :, 50:] = values[:, :, 50:] = math.nan
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, keys[:, :, kept], values[:, :, kept])
    dead = torch.ones(64, dtype=torch.bool).index_fill_(0, kept, False)
    keys[:, :, dead] = values[:, :, dead] = math.nan
    prune_kv_([keys], [values], lengths, keep)
    n = int(lengths)
    torch.testing.assert_close(attend(query, keys[:, :, :n], values[:, :, :n]), expected)


INV_FREQ = 1.0 / 1e4 ** (torch.arange(0, 64, 2) / 64)
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 1e-6}


def exact_turn(key: Tensor, delta: Tensor, inv_freq: Tensor, layout: str) -> Tensor:
    """Keys `[heads, tokens, dim]` turned in fp64, from the frequencies rather than from steps."""
    angle = delta.double()[:, None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    pairs = len(inv_freq)
    first = torch.arange(pairs) * 2 if layout == "interleaved" else torch.arange(pairs)
    second = first + 1 if layout == "interleaved" else first + pairs
    out = key.double().clone()
    x, y = key[..., first].double(), key[..., second].double()
    out[..., first] = x * cos - y * sin
    out[..., second] = x * sin + y * cos
    return out


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The worst slot's error against its own norm."""
    norm = expected.norm(dim=-1).clamp(min=1e-30)
    return float(((got.double() - expected).norm(dim=-1) / norm).max())


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", list(BUDGET), ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_rotation_against_fp64(
    storage: str, dtype: torch.dtype, layout: str, ordered: bool
) -> None:
    """Partial rotary dims, a frequency vector a layer, one layer without; moved or not."""
    batch, capacity = 2, 150
    inv_freqs = [INV_FREQ, INV_FREQ[:5] * 0.7, INV_FREQ[:0], INV_FREQ[3:11].double()]
    generator = torch.Generator().manual_seed(1)
    keys, values = [], []
    for layer in range(4):
        key, value = make_layer(storage, batch, 2, capacity, 64 - layer, torch.int16, layer)
        key, value = key.to(dtype), value.to(dtype)
        keys.append(key.copy_(torch.randn(key.shape, generator=generator)))
        values.append(value.copy_(torch.randn(value.shape, generator=generator)))
    lengths, keep = torch.tensor([150, 97], dtype=torch.int32), random_rows(2, capacity, 2, 0.6)[1]
    delta = torch.randint(-5000, 5000, (batch, capacity), generator=generator, dtype=torch.int32)
    delta[:, ::7] = 0
    before, old_values = [x.clone() for x in keys], [x.clone() for x in values]
    ids = torch.arange(capacity, dtype=torch.int32).repeat(batch, 1)
    old_lengths = lengths.clone()
    prune_kv_(
        keys, values, lengths, keep, slots=[ids], ordered=ordered, position_delta=delta,
        rope=Rope(inv_freqs, layout),
    )  # fmt: skip
    for b in range(batch):
        n = int(lengths[b])
        assert n == keep[b, : old_lengths[b]].sum()
        source = ids[b, :n].long()
        for layer, key in enumerate(keys):
            got, old = key[b, :, :n], before[layer][b, :, source]
            expected = exact_turn(old, delta[b, source], inv_freqs[layer], layout)
            assert relative_error(got, expected) <= BUDGET[dtype]
            rotated = 2 * len(inv_freqs[layer])
            assert_same_bytes(got[..., rotated:], old[..., rotated:], "elements that do not turn")
            still = delta[b, source] == 0
            assert_same_bytes(got[:, still], old[:, still], "keys with no delta")
            assert_same_bytes(key[b, :, n:], before[layer][b, :, n:], "the tail")
            expected_values = old_values[layer][b, :, source]
            assert_same_bytes(values[layer][b, :, :n], expected_values, "values")


@pytest.mark.parametrize("delta", [1, -1, 30_000, -(2**31), 2**31 - 1])
def test_angles_stay_exact_at_any_distance(delta: int) -> None:
    inv_freq = torch.cat((INV_FREQ, INV_FREQ * 3.7, torch.tensor([torch.pi, 100.0]))).double()
    rope = Rope(inv_freq)
    pairs = len(inv_freq)
    key = torch.cat((torch.ones(pairs), torch.zeros(pairs)))[None, None, None].clone()
    lengths, keep = torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool)
    prune_kv_(
        [key], [key.clone()], lengths, keep, rope=rope,
        position_delta=torch.tensor([[delta]], dtype=torch.int32),
    )  # fmt: skip
    for i in range(pairs):
        # Whole turns drop out of an integer product; what is left loses nothing in fp64.
        left = (int(rope.steps[0][i]) * delta) % 2**64
        angle = 2 * math.pi * (left / 2.0**64)
        assert abs(float(key[0, 0, 0, i]) - math.cos(angle)) < 3e-7
        assert abs(float(key[0, 0, 0, pairs + i]) - math.sin(angle)) < 3e-7
        assert abs(int(rope.steps[0][i]) / 2.0**64 * 2 * math.pi % (2 * math.pi)
                   - float(inv_freq[i]) % (2 * math.pi)) < 1e-13  # fmt: skip


# Short contexts, so that some pairs of 64 elements are slowed down, some not, and some in part.
MOVED = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn with a magnitude": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.7,
    },
    "partial yarn with its own magnitude": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.75,
    },
}


@pytest.mark.parametrize("name", MOVED)
def test_a_moved_key_is_the_key_of_its_new_position(name: str) -> None:
    """As a Hugging Face model rotates it, magnitude and all, from the same unrotated key."""
    modeling = pytest.importorskip("transformers.models.phi.modeling_phi")
    parameters = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **MOVED[name]}
    config = modeling.PhiConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=2048,
        rope_parameters=dict(parameters),
    )
    embedding = modeling.PhiRotaryEmbedding(config)
    assert (embedding.attention_scaling != 1) == ("magnitude" in name)
    rope = Rope.from_parameters(config.rope_parameters, 64)
    raw = torch.randn(1, 1, 40, 64, generator=torch.Generator().manual_seed(0))

    def rotated(positions: Tensor) -> Tensor:
        cos, sin = embedding(raw, positions[None])
        turning, still = raw.tensor_split([cos.shape[-1]], -1)
        return torch.cat((modeling.apply_rotary_pos_emb(turning, turning, cos, sin)[1], still), -1)

    keep = torch.ones(1, 40, dtype=torch.bool)
    keep[0, 10:25] = False
    old = torch.arange(40)
    new = torch.where(old < 10, old, old - 15)
    key, positions = rotated(old), old[None].clone()
    lengths = torch.tensor([40], dtype=torch.int32)
    delta = (new - old)[None].to(torch.int32)
    prune_kv_(
        [key], [key.clone()], lengths, keep, slots=[positions], position_delta=delta, rope=rope
    )
    source = positions[0, :25]
    error = (key[:, :, :25] - rotated(new)[:, :, source]).abs().max()
    assert error < 1e-5


def test_drift_over_many_prunes() -> None:
    """Error against fp64 after 1, 20 and 100 rotations of the same keys by -1 to -400 positions."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 32, 128, generator=generator)
    inv_freq = 1.0 / 1e6 ** (torch.arange(0, 128, 2) / 128)
    bounds = {
        torch.bfloat16: {1: 2.5e-3, 20: 1.0e-2, 100: 3.0e-2},
        torch.float16: {1: 3.2e-4, 20: 1.3e-3, 100: 4.0e-3},
        torch.float32: {1: 3e-7, 20: 1e-6, 100: 3e-6},
    }
    for dtype, limits in bounds.items():
        key = start.to(dtype)
        exact, total = key.double(), torch.zeros(32, dtype=torch.int64)
        keep = torch.ones(1, 32, dtype=torch.bool)
        for prune in range(1, 101):
            delta = -torch.randint(1, 401, (1, 32), generator=generator, dtype=torch.int32)
            lengths = torch.tensor([32], dtype=torch.int32)
            prune_kv_(
                [key], [key.clone()], lengths, keep, position_delta=delta, rope=Rope(inv_freq)
            )
            total += delta[0]
            if prune in limits:
                expected = exact_turn(exact[0], total, inv_freq, "half")
                error = float((key[0].double() - expected).norm() / expected.norm())
                print(f"{dtype}: relative error {error:.2e} after {prune} rotations")
                assert error <= limits[prune]


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_lower_simd_levels_rotate_alike(level: str) -> None:
    """In a process that is held to the level; this one runs the highest that the CPU has."""
    program = """
import torch, itertools
from mem1_kernels.ops import reference
from mem1_kernels.ops.prune_kv import prune_kv_
from mem1_kernels.ops.rope import Rope
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
for dtype, layout, pairs in itertools.product(DTYPES, ("half", "interleaved"), (1, 7, 64)):
    key = torch.randn(2, 3, 20, 2 * pairs + 1).to(dtype)
    rope = Rope(1 / 1e4 ** (torch.arange(pairs) / pairs), layout)
    delta = torch.randint(-999, 999, (2, 20), dtype=torch.int32)
    lengths, keep = torch.tensor([20, 13], dtype=torch.int32), torch.rand(2, 20) < 0.5
    expected, expected_lengths = key.double(), lengths.clone()
    reference.prune_kv_([expected], [], expected_lengths, keep, [], False, delta, rope.steps,
                        layout == "interleaved")
    prune_kv_([key], [key.clone()], lengths, keep, position_delta=delta, rope=rope)
    error = (key.double() - expected).abs()
    one_rounding = expected.abs() * torch.finfo(dtype).eps / 2
    assert (error <= one_rounding + 1e-6 * expected.norm(dim=-1, keepdim=True)).all(), (
        dtype, layout, pairs, error.max())

# Half a turn negates: special values and both ends of the subnormals come back as they were.
values = [65504.0, 6e-8, 3e-5, 6.1e-5, 1.0, -2.5, 0.0, 1e-3]
for dtype in DTYPES:
    start = torch.tensor(values + [0.0] * 8).to(dtype)
    key = start[None, None, None].clone()
    call = dict(position_delta=torch.ones(1, 1, dtype=torch.int32),
                rope=Rope(torch.full((8,), torch.pi, dtype=torch.float64)))
    one, keep = torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool)
    prune_kv_([key], [key.clone()], one, keep, **call)
    assert torch.equal(key[0, 0, 0, :8], -start[:8]), (dtype, key)
    for bad in (torch.inf, -torch.inf, torch.nan):
        key = torch.full((1, 1, 1, 16), bad).to(dtype)
        prune_kv_([key], [key.clone()], one, keep, **call)
        assert not key.isfinite().any()
    key = torch.full((1, 1, 1, 16), torch.finfo(dtype).max).to(dtype)
    eighth = Rope(torch.full((8,), torch.pi / 4, dtype=torch.float64))
    prune_kv_([key], [key.clone()], one, keep, position_delta=call["position_delta"], rope=eighth)
    assert (key[0, 0, 0, 8:] == torch.inf).all() and (key[0, 0, 0, :8].abs() < 1e33).all()
"""
    environment = {**os.environ, "MEM1_SIMD": level}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


PARAMETERS = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: p["rope_type"])
def test_frequencies_are_those_of_the_model(parameters: dict[str, float]) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    expected = modeling.LlamaRotaryEmbedding(config).inv_freq
    got = Rope.from_parameters(parameters, 128).inv_freq
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)


def test_several_position_axes_have_the_plain_frequencies() -> None:
    parameters = {"rope_type": "mrope", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    plain = Rope.from_parameters({"rope_theta": 1e6}, 128)
    assert torch.equal(Rope.from_parameters(parameters, 128).inv_freq, plain.inv_freq)


def test_partial_rotary_factor_and_old_spelling() -> None:
    parameters = {"type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.25}
    got = Rope.from_parameters(parameters, 80, layout="interleaved")
    assert len(got.steps[0]) == 10 and got.layout == "interleaved"
    torch.testing.assert_close(got.inv_freq, 0.5 / 1e4 ** (torch.arange(0, 20, 2) / 20))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
            "'dynamic' is not a known",
        ),
        ({"rope_theta": 1e4, "rope_type": "longrope"}, "'longrope' is not a known"),
        ({"rope_theta": 1e4, "rope_type": "new"}, "'new' is not a known"),
        ({"rope_theta": 1e4, "rope_type": "new"}, "known: default, mrope, linear, llama3, yarn"),
        ({"rope_theta": 1e4, "rope_type": "linear"}, "linear needs factor"),
        ({"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}, "yarn needs original_max"),
        ({}, "rope_theta is missing"),
        ({"full_attention": {"rope_theta": 1e4}}, "holds .'full_attention'.: pass one"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.1}, "even number of rotated elements"),
    ],
)
def test_what_is_no_fixed_rotation_raises(parameters: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rope.from_parameters(parameters, 16)


@pytest.mark.parametrize(
    ("inv_freq", "layout", "error", "words"),
    [
        (torch.ones(4), "neox", ValueError, "layout: expected one of"),
        (torch.ones(4).half(), "half", TypeError, "inv_freq: expected float32 or float64"),
        (torch.ones(2, 2), "half", ValueError, r"inv_freq: expected \[rotary_dim / 2\]"),
        (torch.tensor([1.0, math.inf]), "half", ValueError, "inv_freq: expected finite"),
        ([], "half", ValueError, "inv_freq: expected at least one"),
        ([[1.0]], "half", TypeError, "inv_freq: expected float32 or float64"),
    ],
)
def test_rope_errors(inv_freq: object, layout: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        Rope(inv_freq, layout)


def good_call() -> dict:
    key, value = make_layer("head major", 2, 2, 12, 8, torch.float32, 0)
    key2, value2 = make_layer("slot major", 2, 1, 12, 4, torch.float32, 2)
    lengths, keep = torch.tensor([12, 5], dtype=torch.int32), torch.ones(2, 12, dtype=torch.bool)
    keep[:, 2:4] = False
    return {
        "keys": [key, key2],
        "values": [value, value2],
        "lengths": lengths,
        "keep": keep,
        "slots": [torch.arange(24).reshape(2, 12)],
        "position_delta": torch.ones(2, 12, dtype=torch.int32),
        "rope": Rope(torch.ones(2)),
    }


def call_prune(arguments: dict) -> None:
    arguments = dict(arguments)
    positional = [arguments.pop(name) for name in ("keys", "values", "lengths", "keep")]
    prune_kv_(*positional, **arguments)


def replaced(position: int, x: Tensor):
    return lambda tensors: [x if i == position else y for i, y in enumerate(tensors)]


BAD_CALLS = {
    "one value short": ("values", lambda v: v[:1], ValueError, "values: expected 2 tensors"),
    "no tensor": ("keys", lambda k: [k[0], None], TypeError, r"keys\[1\]: expected a tensor"),
    "three dims": ("keys", lambda k: [k[0], k[1][0]], ValueError, r"keys\[1\]: expected \[batch"),
    "other batch": ("keys", lambda k: [k[0][:1], k[1]], ValueError, r"keys\[0\]: expected \[2, 2"),
    "other capacity": (
        "values", lambda v: [v[0], v[1][:, :, :11]], ValueError, r"values\[1\]: expected \[2, 1, 1",
    ),
    "last dim strided": (
        "keys", lambda k: [k[0][..., ::2], k[1]], ValueError, r"keys\[0\]: expected a contiguous",
    ),
    "complex": (
        "values", replaced(0, torch.zeros(2, 2, 12, 8, dtype=torch.complex128)), TypeError,
        r"values\[0\]: expected a dtype of 1, 2, 4 or 8",
    ),
    "int64 lengths": ("lengths", lambda x: x.long(), TypeError, "lengths: expected int32"),
    "wrong lengths": ("lengths", lambda x: x[:1], ValueError, r"lengths: expected \[2\]"),
    "length below 0": (
        "lengths", lambda x: x - 6, ValueError, "lengths: expected 0 to 12 .*in row 1, got -1",
    ),
    "length past capacity": (
        "lengths", lambda x: x + 1, ValueError, "lengths: expected 0 to 12 .*in row 0, got 13",
    ),
    "byte keep": ("keep", lambda x: x.byte(), TypeError, "keep: expected bool"),
    "flat keep": ("keep", lambda x: x[0], ValueError, r"keep: expected \[batch, capacity\]"),
    "wide keep": (
        "keep", lambda x: torch.cat((x, x), 1), ValueError, r"keys\[0\]: expected \[2, 2, 24, 8",
    ),
    "strided keep": (
        "keep", lambda x: x.T.contiguous().T, ValueError, "keep: expected a contiguous last",
    ),
    "flat slots": ("slots", lambda s: [s[0][0]], ValueError, r"slots\[0\]: expected \[2, 12\]"),
    "slots a tensor": ("slots", lambda s: s[0], ValueError, r"slots\[0\]: expected"),
    "slots no tensor": ("slots", lambda s: [[1]], TypeError, r"slots\[0\]: expected a tensor"),
    "delta alone": ("rope", lambda r: None, ValueError, "rope: position_delta and rope go"),
    "rope alone": (
        "position_delta", lambda d: None, ValueError, "position_delta: position_delta and rope go",
    ),
    "int64 delta": (
        "position_delta", lambda d: d.long(), TypeError, "position_delta: expected int32",
    ),
    "narrow delta": (
        "position_delta", lambda d: d[:, :3], ValueError, r"position_delta: expected \[2, 12\]",
    ),
    "no rope": ("rope", lambda r: torch.ones(2), TypeError, "rope: expected a Rope"),
    "too many frequencies": (
        "rope", lambda r: Rope(torch.ones(3)), ValueError, r"at most 4 rotated elements for keys",
    ),
    "three layers of rope": (
        "rope", lambda r: Rope([torch.ones(2)] * 3), ValueError, "rope: expected inv_freq as 1",
    ),
    "rotated fp64": (
        "keys", lambda k: [x.double() for x in k], TypeError, r"keys\[0\]: expected float32",
    ),
    "rotated dtypes": (
        "keys", lambda k: [k[0], k[1].half()], TypeError, "keys: expected one dtype to rotate",
    ),
    "a layer twice": (
        "keys", lambda k: [k[0], k[0]], ValueError, r"keys\[1\]: expected memory apart",
    ),
    "overlapping layers": (
        "keys", lambda k: [k[0], k[0][:, :1, :, 4:]], ValueError, r"keys\[1\]: expected memory",
    ),
    "delta moves along": (
        "slots", lambda s: "position_delta", ValueError, "expected memory apart",
    ),
    "keep moves along": ("slots", lambda s: "keep", ValueError, "expected memory apart"),
    "expanded": (
        "values", lambda v: [v[0][:, :1].expand(2, 2, 12, 8), v[1]], ValueError,
        r"values\[0\]: expected every element in memory of its own",
    ),
    "gradients": (
        "keys", lambda k: [k[0].requires_grad_(), k[1]], ValueError, r"keys\[0\]: requires grad",
    ),
    "meta": ("keys", lambda k: [k[0].to("meta"), k[1]], ValueError, r"keys\[0\]: expected on cpu"),
    "meta delta": (
        "position_delta", lambda d: d.to("meta"), ValueError, "position_delta: expected on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_and_write_nothing(name: str) -> None:
    argument, change, error, words = BAD_CALLS[name]
    arguments = good_call()
    changed = change(arguments[argument])
    arguments[argument] = [arguments[changed]] if isinstance(changed, str) else changed
    if name == "wide keep":
        del arguments["position_delta"], arguments["rope"]
    tensors = [
        x
        for value in arguments.values()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Tensor) and not x.is_meta
    ]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(error, match=words):
        call_prune(arguments)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bytes(x, y, name)


def test_a_lazy_negative_view_is_refused() -> None:
    arguments = good_call()
    held = arguments["keys"][0]
    before = held.clone()
    arguments["keys"] = [torch._neg_view(held), arguments["keys"][1]]
    with pytest.raises(ValueError, match=r"keys\[0\]: expected a plain tensor"):
        call_prune(arguments)
    assert_same_bytes(held, before, "keys")


def test_the_good_call_is_good() -> None:
    call_prune(good_call())


GUARDED = sorted(BAD_CALLS.keys() - {"wide keep", "rope alone", "delta alone", "no rope"})


@pytest.mark.skipif(
    "mem1_kernels._C" not in implementations["prune_kv_", "CPU"], reason="needs the extension"
)
@pytest.mark.parametrize("name", GUARDED)
def test_the_compiled_operator_guards_itself(name: str) -> None:
    """Called past the public function, it raises and writes nothing either."""
    argument, change, error, _ = BAD_CALLS[name]
    arguments = good_call()
    changed = change(arguments[argument])
    arguments[argument] = [arguments[changed]] if isinstance(changed, str) else changed
    lists = [x for x in arguments.values() if isinstance(x, list)]
    tensors = [x for xs in lists for x in xs if isinstance(x, Tensor) and not x.is_meta]
    before = [x.detach().clone() for x in tensors]
    rope = arguments.pop("rope")
    delta = arguments.pop("position_delta")
    with pytest.raises((error, RuntimeError)):
        torch.ops.mem1.prune_kv_(*arguments.values(), False, delta, rope.steps, False)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bytes(x, y, name)


def test_saved_for_backward_then_pruned_raises() -> None:
    weight = torch.ones(8, requires_grad=True)
    key, value = make_layer("head major", 1, 1, 4, 8, torch.float32, 0)
    loss = (key * weight).sum()
    lengths, keep = torch.tensor([4], dtype=torch.int32), torch.tensor([[False, True, True, True]])
    prune_kv_([key], [value], lengths, keep)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_shapes() -> None:
    for batch, capacity, heads in [(0, 4, 2), (2, 0, 2), (2, 4, 0)]:
        key = torch.zeros(batch, heads, capacity, 8)
        lengths = torch.full((batch,), capacity, dtype=torch.int32)
        keep = torch.zeros(batch, capacity, dtype=torch.bool)
        prune_kv_([key], [key.clone()], lengths, keep)
        assert (lengths == 0).all()


def test_opcheck() -> None:
    arguments = good_call()
    rope = arguments["rope"]
    for rotation in ((arguments["position_delta"], rope.steps), (None, [])):
        torch.library.opcheck(
            torch.ops.mem1.prune_kv_.default,
            (
                arguments["keys"],
                arguments["values"],
                arguments["lengths"],
                arguments["keep"],
                arguments["slots"],
                False,
                *rotation,
                False,
            ),
        )


def test_compiled_without_a_graph_break() -> None:
    arguments, same = good_call(), good_call()
    compiled = torch.compile(call_prune, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(arguments)
    call_prune(same)
    for name in ("keys", "values", "slots"):
        for x, y in zip(arguments[name], same[name], strict=True):
            assert_same_bytes(x, y, name)
    assert torch.equal(arguments["lengths"], same["lengths"])


def refuses(check, *arguments) -> bool:
    try:
        check(*arguments)
    except ValueError as error:
        assert "memory" in str(error)
        return True
    return False


def test_memory_check_against_marked_bytes() -> None:
    """No overlap is missed, by either check, and views as caches have them are told apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def compiled_check(views: list[Tensor]) -> None:
        if "mem1_kernels._C" not in implementations["prune_kv_", "CPU"]:
            return check_disjoint({"a": views[0], "b": views[1]}, {})
        # One slot a row and none of it in use: nothing is written.
        keys, values = ([x.unsqueeze(2)] for x in views)
        lengths = torch.zeros(len(views[0]), dtype=torch.int32)
        keep = torch.zeros(len(views[0]), 1, dtype=torch.bool)
        torch.ops.mem1.prune_kv_(keys, values, lengths, keep, [], False, None, [], False)

    found = {True: 0, False: 0}
    for _ in range(1500):
        pool = torch.zeros(4096, dtype=torch.uint8)
        views = []
        shared_strides = None
        batch = draw(1, 4)
        for _ in range(2):
            shape = [batch, draw(1, 4), draw(1, 6)]
            strides = [draw(1, 40), draw(1, 20), 1]
            if shared_strides is not None and draw(0, 3):
                strides = shared_strides
            shared_strides = strides
            views.append(pool.as_strided(shape, strides, draw(0, 150)))
        marks = []
        for view in views:
            pool.zero_()
            offsets = torch.arange(4096).as_strided(
                view.shape, view.stride(), view.storage_offset()
            )
            marks.append(set(offsets.flatten().tolist()))
        clash = bool(marks[0] & marks[1]) or any(
            len(m) < v.numel() for m, v in zip(marks, views, strict=True)
        )
        said = refuses(check_disjoint, {"a": views[0], "b": views[1]}, {})
        assert said or not clash, (views[0].stride(), views[1].stride())
        found[said] += 1
        assert said == refuses(compiled_check, views), [x.stride() for x in views]
    assert min(found.values()) > 100
    joined = torch.zeros(3, 2, 4, 5, 6)
    cut = torch.zeros(3, 5, 4, 10)
    check_disjoint(
        {
            "k": joined[:, 0],
            "v": joined[:, 1],
            "k2": cut[..., :6].transpose(1, 2),
            "v2": cut[..., 6:].transpose(1, 2),
        },
        {},
    )
    rows = torch.zeros(3, 100)
    check_disjoint(
        {"a": rows[:, :40].view(3, 2, 4, 5), "b": rows[:, 40:].view(3, 3, 4, 5)},
        {"c": joined},
    )


def gather_paged(x: Tensor, layout: str, table: Tensor, length: int) -> Tensor:
    """A row's tokens `[tokens, heads, dim]` through its table."""
    x = x if layout == "NHD" else x.transpose(1, 2)
    page_size = x.shape[1]
    used = -(-length // page_size)
    return x[table[:used].long()].flatten(0, 1)[:length]


@pytest.mark.parametrize("kind", PAGED_KINDS)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32], ids=str)
def test_paged_bytes_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    sizes = [(1, 9), (2, 6), (3, 5), (16, 4), (16, 7), (64, 3)]
    for seed, (page_size, max_pages) in enumerate(sizes):
        for keep_share in (0.1, 0.6, 0.97):
            batch = 3
            table, lengths, keep, pages = paged_rows(
                batch, max_pages, page_size, seed, keep_share, runs=keep_share == 0.6
            )
            layers = [
                make_pages(kind, pages, page_size, heads, dim, dtype, seed + layer)
                for layer, (heads, dim) in enumerate([(2, 16), (1, 7)])
            ]
            layout = layers[0][0]
            keys, values = [x[1] for x in layers], [x[2] for x in layers]
            slots = [random_bytes((pages, page_size), torch.int64, seed + 9)]
            generator = torch.Generator().manual_seed(seed)
            refs = torch.randint(1, 4, (pages,), generator=generator, dtype=torch.int32)
            page_refs = refs if seed % 2 else None

            expected = [[x.clone() for x in xs] for xs in (keys, values, slots)]
            expected_table, expected_lengths = table.clone(), lengths.clone()
            expected_freed, expected_counts = torch.empty_like(table), torch.empty_like(lengths)
            nhd = [x if layout == "NHD" else x.transpose(1, 2) for x in expected[0]]
            nhd_values = [x if layout == "NHD" else x.transpose(1, 2) for x in expected[1]]
            reference.prune_paged_kv_(
                nhd, nhd_values, expected_table, expected_lengths, keep, page_refs, expected[2],
                expected_freed, expected_counts,
            )  # fmt: skip
            freed, counts = prune_paged_kv_(
                keys, values, table, lengths, keep, layout=layout, page_refs=page_refs, slots=slots
            )
            assert torch.equal(table, expected_table)
            assert torch.equal(lengths, expected_lengths)
            assert torch.equal(freed, expected_freed)
            assert torch.equal(counts, expected_counts)
            for got, wanted in zip((keys, values, slots), expected, strict=True):
                for x, y in zip(got, wanted, strict=True):
                    assert_same_bytes(x, y, kind)


@pytest.mark.parametrize("seed", range(30))
def test_paged_promises(seed: int) -> None:
    """Without the reference: survivors, conserved pages, untouched pages, and how few moves."""
    page_size, max_pages, batch = (1, 4, 16)[seed % 3], 12, 3
    runs = seed % 2 == 0
    table, lengths, keep, pages = paged_rows(batch, max_pages, page_size, seed, 0.7, runs)
    generator = torch.Generator().manual_seed(seed)
    page_refs = 1 + (torch.rand(pages, generator=generator) < 0.3).int()
    ids = torch.arange(pages * page_size).reshape(pages, page_size)
    keys = ids[:, :, None, None].float().repeat(1, 1, 2, 3)
    values = keys + 0.5
    old_ids, old_table, old_lengths = ids.clone(), table.clone(), lengths.clone()
    freed, counts = prune_paged_kv_(
        [keys], [values], table, lengths, keep, page_refs=page_refs, slots=[ids]
    )
    owner = page_refs == 1
    assert torch.equal(ids[~owner], old_ids[~owner]), "a shared page was written"
    for b in range(batch):
        old_length, length = int(old_lengths[b]), int(lengths[b])
        old_used, used = -(-old_length // page_size), -(-length // page_size)
        kept = keep[b, :old_length]
        old_tokens = gather_paged(old_ids[:, :, None], "NHD", old_table[b], old_length)[:, 0]
        now = gather_paged(ids[:, :, None], "NHD", table[b], length)[:, 0]
        assert torch.equal(gather_paged(keys, "NHD", table[b], length)[:, 1, 2], now.float())
        assert torch.equal(table[b, old_used:], old_table[b, old_used:])
        if counts[b] < 0:
            assert length == old_length and torch.equal(now, old_tokens)
            assert torch.equal(table[b], old_table[b]) and (freed[b] == -1).all()
            assert not kept.all()
            continue
        assert torch.equal(now.sort().values, old_tokens[kept].sort().values)
        assert counts[b] == old_used - used
        assert torch.equal(freed[b, : counts[b]], table[b, used:old_used])
        assert (freed[b, counts[b] :] == -1).all()
        assert torch.equal(
            table[b, :old_used].sort().values, old_table[b, :old_used].sort().values
        ), "a page was lost"
        if length % page_size:
            assert kept.all() or owner[table[b, used - 1]], "the next token goes to a shared page"
        padded = torch.cat((kept, kept.new_zeros(old_used * page_size - old_length)))
        whole = padded.view(old_used, page_size).all(1)
        in_place = old_table[b, :old_used][whole]
        assert torch.equal(table[b, : len(in_place)], in_place)
        assert torch.equal(ids[in_place.long()], old_ids[in_place.long()])
        if runs and page_refs[old_table[b, :old_used].long()].eq(1).all():
            changed = ids[old_table[b, :old_used].long()] != old_ids[old_table[b, :old_used].long()]
            assert changed.sum() <= 2 * page_size


def test_paged_pages_shared_within_the_batch() -> None:
    """A group behind one prompt: its pages stay in every table and keep their bytes."""
    ids = torch.arange(40).reshape(10, 4)
    keys = ids[:, :, None, None].float()
    table = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, 6, 7]], dtype=torch.int32)
    lengths = torch.tensor([20, 18], dtype=torch.int32)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 8:15] = False
    page_refs = torch.tensor([2, 2, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.int32)
    prune_paged_kv_([keys], [keys + 100], table, lengths, keep, page_refs=page_refs, slots=[ids])
    assert lengths.tolist() == [13, 11]
    assert table[:, :2].tolist() == [[0, 1], [0, 1]]
    expected = [set(range(8)) | set(range(15, 20)), set(range(8)) | {27, 28, 29}]
    for b in range(2):
        tokens = gather_paged(ids[:, :, None], "NHD", table[b], int(lengths[b])).flatten()
        assert set(tokens.tolist()) == expected[b]


def test_paged_shared_page_with_a_hole_moves_out_or_the_row_stays() -> None:
    ids = torch.arange(16).reshape(4, 4)
    keys = ids[:, :, None, None].float()
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    lengths = torch.tensor([8], dtype=torch.int32)
    keep = torch.tensor([[True, False, True, True, False, False, False, False]])
    page_refs = torch.tensor([2, 1, 1, 1], dtype=torch.int32)
    freed, counts = prune_paged_kv_(
        [keys], [keys + 1], table, lengths, keep, page_refs=page_refs, slots=[ids]
    )
    assert (table.tolist(), lengths.tolist(), freed.tolist()) == ([[1, 0]], [3], [[0, -1]])
    assert ids[1, :3].tolist() == [0, 2, 3] and ids[0].tolist() == [0, 1, 2, 3]

    lengths, table = torch.tensor([4], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int32)
    before = ids.clone()
    freed, counts = prune_paged_kv_(
        [keys], [keys + 1], table, lengths, keep, page_refs=page_refs, slots=[ids]
    )
    assert (counts.tolist(), lengths.tolist(), table.tolist()) == ([-1], [4], [[0]])
    assert torch.equal(ids, before)


def test_paged_long_run_moves_as_little_as_a_short_one() -> None:
    page_size, max_pages = 16, 200
    table = torch.arange(max_pages, dtype=torch.int32)[None]
    for run in (20, 200, 2000):
        ids = torch.arange(max_pages * page_size).reshape(max_pages, page_size)
        before = ids.clone()
        keys = torch.zeros(max_pages, page_size, 1, 8)
        keep = torch.ones(1, max_pages * page_size, dtype=torch.bool)
        keep[0, 1001 : 1001 + run] = False
        lengths = torch.tensor([max_pages * page_size - 3], dtype=torch.int32)
        _, counts = prune_paged_kv_([keys], [keys + 1], table.clone(), lengths, keep, slots=[ids])
        assert (ids != before).sum() <= 2 * page_size
        assert int(counts[0]) == max_pages - -(-int(lengths) // page_size)


def good_paged_call() -> dict:
    pages = 6
    _, key, value = make_pages("NHD apart", pages, 4, 2, 8, torch.float32, 0)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[:, 3:6] = False
    return {
        "keys": [key],
        "values": [value],
        "block_table": torch.tensor([[5, 3, 1], [0, 2, 4]], dtype=torch.int32),
        "lengths": torch.tensor([12, 7], dtype=torch.int32),
        "keep": keep,
        "page_refs": torch.ones(pages, dtype=torch.int32),
        "slots": [torch.arange(24).reshape(6, 4)],
        "freed": torch.zeros(2, 3, dtype=torch.int32),
        "freed_counts": torch.zeros(2, dtype=torch.int32),
    }


def edited(index: tuple[int, ...], value: int):
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


BAD_PAGED_CALLS = {
    "no layer": ("keys", lambda k: [], ValueError, "values: expected 0|keys: expected at least"),
    "layout": ("layout", lambda x: "NDH", ValueError, "layout: expected 'NHD' or 'HND'"),
    "three dims": ("keys", lambda k: [k[0][0]], ValueError, r"keys\[0\]: expected \[pages"),
    "other pages": ("values", lambda v: [v[0][:5]], ValueError, r"values\[0\]: expected \[6, 4"),
    "int64 table": ("block_table", lambda x: x.long(), TypeError, "block_table: expected int32"),
    "short table": ("block_table", lambda x: x[:1], ValueError, r"block_table: expected \[2"),
    "page too high": (
        "block_table", edited((1, 1), 6), ValueError, "pages 0 to 5 in row 1, got 6",
    ),
    "page below 0": (
        "block_table", edited((0, 0), -1), ValueError, "pages 0 to 5 in row 0, got -1",
    ),
    "page twice in a row": (
        "block_table", edited((0, 2), 3), ValueError, "expected page 3 once",
    ),
    "page in two rows": (
        "block_table", edited((1, 0), 5), ValueError, "expected page 5 once",
    ),
    "too long": ("lengths", edited((0,), 13), ValueError, "lengths: expected 0 to 12 .*in row 0"),
    "negative": ("lengths", edited((1,), -1), ValueError, "lengths: expected 0 to 12 .*in row 1"),
    "unused page": (
        "page_refs", edited((3,), 0), ValueError, "page_refs: expected at least 1 for page 3",
    ),
    "refs shape": ("page_refs", lambda x: x[:4], ValueError, r"page_refs: expected \[6\]"),
    "refs dtype": ("page_refs", lambda x: x.long(), TypeError, "page_refs: expected int32"),
    "slots shape": ("slots", lambda s: [s[0].T], ValueError, r"slots\[0\]: expected \[6, 4\]"),
    "freed shape": ("freed", lambda x: x[:, :2], ValueError, r"freed: expected \[2, 3\]"),
    "counts dtype": ("freed_counts", lambda x: x.long(), TypeError, "freed_counts: expected int32"),
    "values are keys": (
        "values", lambda v: "keys", ValueError, r"values\[0\]: expected memory apart",
    ),
    "freed is the table": ("freed", lambda x: "block_table", ValueError, "expected memory apart"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAGED_CALLS)
def test_bad_paged_calls_raise_and_write_nothing(name: str) -> None:
    argument, change, error, words = BAD_PAGED_CALLS[name]
    arguments = good_paged_call()
    changed = change(arguments.get(argument))
    arguments[argument] = (
        arguments[changed] if isinstance(changed, str) and argument != "layout" else changed
    )
    tensors = [
        x
        for value in arguments.values()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Tensor)
    ]
    before = [x.clone() for x in tensors]
    positional = [
        arguments.pop(name) for name in ("keys", "values", "block_table", "lengths", "keep")
    ]
    with pytest.raises(error, match=words):
        prune_paged_kv_(*positional, **arguments)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bytes(x, y, name)


@pytest.mark.parametrize(
    ("argument", "index", "value", "words"),
    [
        ("lengths", (0,), 13, "lengths: expected 0 to 12"),
        ("lengths", (1,), -1, "lengths: expected 0 to 12"),
        ("block_table", (1, 1), 6, "block_table: expected pages 0 to 5"),
    ],
)
def test_paged_in_triton_names_what_is_out_of_range(
    argument: str, index: tuple[int, ...], value: int, words: str
) -> None:
    pytest.importorskip("triton")
    from mem1_kernels.ops.triton import prune_kv

    arguments = good_paged_call()
    arguments[argument] = edited(index, value)(arguments[argument])
    with pytest.raises(RuntimeError, match=words):
        prune_kv.prune_paged_kv_(**arguments)


def test_paged_results_go_where_they_are_wanted() -> None:
    arguments = good_paged_call()
    positional = [
        arguments.pop(name) for name in ("keys", "values", "block_table", "lengths", "keep")
    ]
    freed, counts = prune_paged_kv_(*positional, **arguments)
    assert freed is arguments["freed"] and counts is arguments["freed_counts"]
    assert counts.tolist() == [0, 1] and positional[3].tolist() == [9, 4]
    assert freed.tolist() == [[-1, -1, -1], [2, -1, -1]]


def test_paged_opcheck() -> None:
    arguments = good_paged_call()
    order = ("keys", "values", "block_table", "lengths", "keep", "page_refs", "slots")
    order += ("freed", "freed_counts")
    torch.library.opcheck(
        torch.ops.mem1.prune_paged_kv_.default, tuple(arguments[name] for name in order)
    )
