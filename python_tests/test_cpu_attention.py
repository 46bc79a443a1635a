"""The C++ attention kernels on the CPU, called as torch.ops.mem1, at every SIMD level they have."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from mem1_kernels import BlockPlan
from mem1_kernels.ops import _library
from mem1_kernels.testing import (
    AttentionResult,
    assert_within_budget,
    plain_attention,
    random_expiry,
    turns,
)

if not _library.HAS_EXTENSION:
    pytest.skip("mem1_kernels._C is not built", allow_module_level=True)

from mem1_kernels import _C

GENERATOR = partial(torch.Generator().manual_seed)
FORWARD = torch.ops.mem1.trajectory_attention_fwd
BACKWARD = torch.ops.mem1.trajectory_attention_bwd
RESULTS = ("out", "lse", "grad_query", "grad_key", "grad_value")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 63, 64, 65, 127, 128, 129, 255, 300, 515)
HEAD_DIMS = (16, 24, 40, 64, 80, 96, 128, 192, 256)
GROUPS = ((2, 2), (2, 1), (4, 1), (7, 1), (4, 2))


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """Whatever the kernels allocate and do not write stays NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Inputs and layout of one attention call."""

    def __init__(
        self,
        tokens: int,
        heads: tuple[int, int] = (2, 1),
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        *,
        batch: int = 1,
        expiry: Tensor | None = None,
        floor: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        generator = GENERATOR(tokens * 1000 + head_dim)

        def normal(count: int) -> Tensor:
            return torch.randn(batch, tokens, count, head_dim, generator=generator).to(dtype)

        self.query, self.key, self.value = (normal(h) for h in (heads[0], heads[1], heads[1]))
        self.grad_out = normal(heads[0])
        self.grad_lse = torch.randn(batch, heads[0], tokens, generator=generator)
        self.expiry = torch.full((tokens,), tokens) if expiry is None else expiry
        self.floor = floor
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.plan = BlockPlan.from_expiry(self.expiry, floor)

    def run(self) -> AttentionResult:
        plan, numbers = self.plan, (self.scale, self.softcap)
        layout = (plan.expiry, plan.floor, plan.rows)
        inputs = (self.query, self.key, self.value)
        out, lse = FORWARD(*inputs, *layout, *numbers)
        gradients = BACKWARD(
            self.grad_out, self.grad_lse, *inputs, out, lse, *layout, plan.columns, *numbers
        )
        return AttentionResult(out, lse, *gradients)

    def check(self) -> None:
        arguments = (self.query, self.key, self.value, self.expiry, self.floor, self.grad_out)
        plain_call = partial(
            plain_attention, *arguments, self.grad_lse, scale=self.scale, softcap=self.softcap
        )
        got, plain, exact = self.run(), plain_call(), plain_call(dtype=torch.float64)
        for name in RESULTS:
            assert_within_budget(
                name, getattr(got, name), getattr(plain, name), getattr(exact, name)
            )


def assert_same(got: AttentionResult, want: AttentionResult) -> None:
    for name in RESULTS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def random_floor(tokens: int, seed: int, batch: int | None = None) -> Tensor:
    shape = (tokens,) if batch is None else (batch, tokens)
    return torch.randint(0, tokens, shape, generator=GENERATOR(seed), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_budget_of_sizes(tokens, dtype):
    number = SIZES.index(tokens)
    heads, head_dim = GROUPS[number % len(GROUPS)], HEAD_DIMS[(3 * number) % len(HEAD_DIMS)]
    case = partial(Case, tokens, heads, head_dim, dtype)
    case().check()
    case(batch=2, expiry=random_expiry(tokens, GENERATOR(1), 2)).check()
    case(expiry=random_expiry(tokens, GENERATOR(2)), floor=random_floor(tokens, 3)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_budget_of_head_dims(head_dim, dtype):
    """Turns of 80: empty, partial and full tiles."""
    layout = turns(50, 6, 20, 10, 50)
    case = partial(Case, layout.num_tokens, (2, 1), head_dim, dtype, expiry=layout.expiry)
    case().check()
    case(softcap=4.0).check()


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_budget_of_groups_with_everything(heads):
    expiry, floor = random_expiry(270, GENERATOR(4), 3), random_floor(270, 5, 3)
    Case(270, heads, 32, batch=3, expiry=expiry, floor=floor, scale=0.6, softcap=2.5).check()


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_budget_of_odd_scales(scale):
    Case(200, expiry=random_expiry(200, GENERATOR(6)), scale=scale).check()


def test_budget_with_a_floor_that_follows_the_query():
    """A sliding window of 70 written as a floor: tiles that are narrowed from both sides."""
    floor = (torch.arange(400) - 69).clamp(min=0)
    case = Case(400, head_dim=32, floor=floor)
    case.check()
    as_expiry = Case(400, head_dim=32, expiry=torch.arange(400) + 70)
    for name in RESULTS:
        torch.testing.assert_close(getattr(case.run(), name), getattr(as_expiry.run(), name))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_with_poison_in_what_nobody_sees(dtype, poison):
    tokens = 290
    expiry = random_expiry(tokens, GENERATOR(8))
    expiry[:9] = torch.arange(9)
    expiry[100:140] = 0
    expiry[280:] = 5
    case = Case(tokens, (4, 2), 40, dtype, expiry=expiry)
    token = torch.arange(tokens)
    mask = (token <= token[:, None]) & (token[:, None] < expiry)
    blind, unseen = ~mask.any(1), ~mask.any(0)
    assert blind.any()
    assert unseen.sum() > 40
    for x, rows in (
        (case.query, blind),
        (case.key, unseen),
        (case.value, unseen),
        (case.grad_out, blind),
    ):
        x[:, rows] = poison
    case.grad_lse[:, :, blind] = poison
    case.check()
    result = case.run()
    assert (result.out[:, blind] == 0).all()
    assert (result.lse[:, :, blind] == -torch.inf).all()
    assert (result.grad_query[:, blind] == 0).all()
    assert (result.grad_key[:, unseen] == 0).all()
    assert (result.grad_value[:, unseen] == 0).all()


def test_budget_of_equal_values():
    """The weights of what is multiplied sum to 1, so equal values come back, bit by bit."""
    case = Case(515, (4, 2), 64, torch.bfloat16, expiry=random_expiry(515, GENERATOR(9)), scale=0.5)
    case.value[:] = case.value[:, :1].clone()
    seen = case.run().lse[0, 0] > -torch.inf
    same = case.value.repeat_interleave(2, 2)
    assert torch.equal(case.run().out[:, seen], same[:, seen])


def lower_levels() -> list[str]:
    info = _C.build_info()
    levels = info["simd_compiled"]
    return levels[: levels.index(info["simd"])]


@pytest.mark.skipif("MEM1_SIMD" in os.environ, reason="runs in the process that sets the level")
@pytest.mark.parametrize("level", lower_levels())
def test_every_lower_simd_level(level):
    """The budgets above in a process whose kernels are held to this level."""
    environment = {**os.environ, "MEM1_SIMD": level}
    script = "import torch; from mem1_kernels import _C; print(_C.build_info()['simd'])"
    used = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert used.stdout.strip() == level
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "budget"]
    subprocess.run([*command, __file__], env=environment, check=True)


def test_a_nan_that_is_seen_is_not_hidden():
    """In a full tile and in a partial one; queries that cannot see it are untouched."""
    clean = Case(300, expiry=torch.cat([torch.full((200,), 300), torch.full((100,), 280)]))
    want = clean.run().out
    for key in (3, 210):
        for x in (clean.key, clean.value):
            saved = x[0, key, 0, 1].item()
            x[0, key, 0, 1] = torch.nan
            got = clean.run().out
            x[0, key, 0, 1] = saved
            seeing = torch.arange(300) >= key
            seeing &= torch.arange(300) < clean.expiry[key]
            assert got[0, seeing].isnan().any(-1).all()
            # Within its own partial tile 0 * NaN reaches the product over keys of V.
            if x is clean.key:
                assert torch.equal(got[0, ~seeing], want[0, ~seeing])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    case = Case(200, (4, 2), 24, dtype, batch=2, expiry=random_expiry(200, GENERATOR(9)))
    names = ("query", "key", "value", "grad_out")
    case.grad_out = case.grad_out[:, :1].expand(-1, 200, -1, -1)
    case.value = case.value[:1].expand(2, -1, -1, -1)
    contiguous = {name: getattr(case, name).contiguous() for name in names}
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in contiguous.items()}
    fused = torch.cat([contiguous["query"], contiguous["key"], contiguous["value"]], 2)
    parts = dict(zip(names, fused.split([4, 2, 2], 2), strict=False))
    expanded = {name: getattr(case, name) for name in names}
    vars(case).update(contiguous)
    want = case.run()
    for inputs in (expanded, views, {**views, **parts}):
        vars(case).update(inputs)
        assert_same(case.run(), want)
    case.grad_lse = case.grad_lse.transpose(0, 2).contiguous().transpose(0, 2)
    assert_same(case.run(), want)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (4, 2)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(heads):
    expiry = torch.stack([turns(130, 8, 30, 10, 60).expiry, torch.full((870,), 870)]).int()
    floor = random_floor(870, 10, 2)
    cases = [
        Case(870, heads, 16, batch=2, expiry=expiry),
        Case(870, heads, 16, torch.bfloat16, batch=2, expiry=expiry, floor=floor),
    ]
    threads = torch.get_num_threads()
    try:
        for case in cases:
            torch.set_num_threads(1)
            want = case.run()
            for count in (2, 5, 2):
                torch.set_num_threads(count)
                assert_same(case.run(), want)
    finally:
        torch.set_num_threads(threads)


def test_batch_rows_with_their_own_layouts_equal_each_alone():
    expiry, floor = random_expiry(280, GENERATOR(11), 3), random_floor(280, 12, 3)
    together = Case(280, (2, 1), 16, batch=3, expiry=expiry, floor=floor)
    results = together.run()
    for row in range(3):
        alone = Case(280, expiry=expiry[row], floor=floor[row])
        for name in ("query", "key", "value", "grad_out", "grad_lse"):
            setattr(alone, name, getattr(together, name)[row : row + 1])
        for name in RESULTS:
            assert torch.equal(getattr(alone.run(), name), getattr(results, name)[row : row + 1])


def test_memory_grows_with_the_tokens():
    """Bytes that both passes allocate, at 2,048 and 4,096 tokens."""

    def allocated(tokens: int) -> int:
        case = Case(tokens)
        with torch.profiler.profile(profile_memory=True) as profile:
            case.run()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    assert 0 < allocated(4096) < 2.2 * allocated(2048)


def with_entry(x: Tensor, index: int, entry: int) -> Tensor:
    x = x.clone()
    x[0, index] = entry
    return x


# What to change in a call of 300 tokens (3 tiles), and what the error says.
WRONG_ARGUMENTS = {
    "query: expected 4 dimensions": {"query": lambda c: c.query[0]},
    "query: expected dtype Float, Half or BFloat16, got Double": {"query": lambda c: c.query * 1.0},
    "query: expected head_dim 16 to 256 in steps of 8, got 12": {
        name: lambda c, name=name: getattr(c, name)[..., :12].contiguous()
        for name in ("query", "key", "value")
    },
    "query: expected heads divisible by 2 kv_heads, got 3": {
        "query": lambda c: c.query[:, :, :1].expand(-1, -1, 3, -1)
    },
    "query: expected a contiguous last dimension": {
        "query": lambda c: c.query.transpose(2, 3).contiguous().transpose(2, 3)
    },
    r"key: expected shape \[1, 300, 2, 16\]": {"key": lambda c: c.key[:, :299]},
    "value: expected dtype Float, got Half": {"value": lambda c: c.value.half()},
    "value: expected a contiguous last dimension": {
        "value": lambda c: c.value.transpose(2, 3).contiguous().transpose(2, 3)
    },
    "expiry: expected dtype Int, got Long": {"expiry": lambda c: c.plan.expiry.long()},
    r"expiry: expected shape \[1, 300\]": {"expiry": lambda c: c.plan.expiry[:, :299]},
    "expiry: expected a contiguous tensor": {
        "expiry": lambda c: c.plan.expiry.repeat(1, 2)[:, ::2]
    },
    r"floor: expected shape \[1, 300\]": {"floor": lambda c: c.plan.expiry[:, :4]},
    "rows: expected row_order, row_offsets, row_partial, row_tiles, got 3 tensors": {
        "rows": lambda c: c.plan.rows[:3]
    },
    r"row_order: expected shape \[1, 3\]": {
        "row_order": lambda c: c.plan.named()["row_order"][:, :2]
    },
    "row_order: expected a permutation of 0 to 2, got 3": {
        "row_order": lambda c: with_entry(c.plan.named()["row_order"], 1, 3)
    },
    "row_order: expected a permutation of 0 to 2, got 2": {
        "row_order": lambda c: with_entry(c.plan.named()["row_order"], 1, 2)
    },
    "row_offsets: expected 0 first, got 1": {
        "row_offsets": lambda c: with_entry(c.plan.named()["row_offsets"], 0, 1)
    },
    "row_offsets: expected 3 to 6 at 3, got 7": {
        "row_offsets": lambda c: with_entry(c.plan.named()["row_offsets"], 3, 7)
    },
    "row_partial: expected 0 to 2 at 1, got -1": {
        "row_partial": lambda c: with_entry(c.plan.named()["row_partial"], 1, -1)
    },
    "row_tiles: expected ascending key tiles in 0 to 2 for query tile 2, got 3": {
        "row_tiles": lambda c: with_entry(c.plan.named()["row_tiles"], 5, 3)
    },
    "row_tiles: expected ascending key tiles in 0 to 1 for query tile 1, got -1": {
        "row_tiles": lambda c: with_entry(c.plan.named()["row_tiles"], 1, -1)
    },
    "row_tiles: expected a key tile once for query tile 1, got 1 twice": {
        "row_tiles": lambda c: with_entry(c.plan.named()["row_tiles"], 2, 1)
    },
    "scale: expected a finite number, got inf": {"scale": lambda c: torch.inf},
    "softcap: expected a number >= 0": {"softcap": lambda c: -1.0},
    r"grad_out: expected shape \[1, 300, 4, 16\]": {"grad_out": lambda c: c.grad_out[:, :, :2]},
    "grad_out: expected dtype Float, got BFloat16": {"grad_out": lambda c: c.grad_out.bfloat16()},
    r"out: expected shape \[1, 300, 4, 16\]": {"out": lambda c: c.query[:, :1]},
    r"lse: expected shape \[1, 4, 300\]": {"lse": lambda c: c.grad_lse[..., :1]},
    "lse: expected dtype Float, got Double": {"lse": lambda c: c.grad_lse.double()},
    r"grad_lse: expected shape \[1, 4, 300\]": {"grad_lse": lambda c: c.grad_lse[:, :2]},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_of_a_direct_call(message):
    case = Case(300, (4, 2))
    if "got Double" in message and message.startswith("query"):
        case.query = case.query.double()
    result = case.run() if case.query.dtype == torch.float32 else None
    arguments = {
        "grad_out": case.grad_out,
        "grad_lse": case.grad_lse,
        "query": case.query,
        "key": case.key,
        "value": case.value,
        "out": result.out if result else case.query,
        "lse": result.lse if result else case.grad_lse,
        "expiry": case.plan.expiry,
        "floor": None,
        "rows": case.plan.rows,
        "columns": case.plan.columns,
        "scale": case.scale,
        "softcap": 0.0,
    }
    lists = dict(
        zip(
            ("row_order", "row_offsets", "row_partial", "row_tiles"),
            arguments["rows"],
            strict=False,
        )
    )
    for name, change in WRONG_ARGUMENTS[message].items():
        (lists if name in lists else arguments)[name] = change(case)
    if any(name in lists for name in WRONG_ARGUMENTS[message]):
        arguments["rows"] = list(lists.values())
    expected = TypeError if "expected dtype" in message else ValueError
    with pytest.raises(expected, match=message):
        BACKWARD(*arguments.values())
    backward_only = ("grad_out", "grad_lse", "out", "lse", "columns")
    if not any(name in backward_only for name in WRONG_ARGUMENTS[message]):
        with pytest.raises(expected, match=message):
            FORWARD(*(x for name, x in arguments.items() if name not in backward_only))
