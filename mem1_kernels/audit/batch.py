"""Rollouts as files hold them: our JSON lines, and what TRL, verl and slime dump.

| file | from | token ids | log-probs |
|---|---|---|---|
| `.jsonl` with `token_ids` | anybody | yes | yes |
| `.pt` | slime, `--save-debug-rollout-data` | yes | yes |
| `.parquet` | TRL, `log_completions=True` | if a reward function logs them | likewise |
| `.jsonl` with `input` | verl, `trainer.rollout_data_dir` | no: text, no special tokens | no |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.tree import TokenRow

FIELDS = ("token_ids", "loss_mask", "log_probs", "evicted_at", "position_ids", "sample")
"""What a line of our JSON lines may hold."""


@dataclass(frozen=True, eq=False)
class BatchRow:
    """One row of a batch.

    Args:
        tokens: its ids, which of them are trained, and the sampled log-probs (None: not recorded).
        where: how messages name it, such as "line 3".
        expiry: int32 `[tokens]`: the first index whose query no longer saw the token in the
            rollout. None: nothing was evicted.
        position_ids: int64 `[tokens]`, those of the rollout. None: 0, 1, 2, ...
    """

    tokens: TokenRow
    where: str
    expiry: Tensor | None = None
    position_ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of a file.

    Args:
        rows: at least one.
        source: what wrote the file, in words.
        has_ids: whether the rows hold the rollout's own token ids, not some made from its text.
    """

    rows: tuple[BatchRow, ...]
    source: str
    has_ids: bool


def read_batch(path: str | Path, tokenizer: Any = None) -> Batch:
    """Reads a file of rollouts.

    A line of our JSON lines is an object: `token_ids`, `loss_mask` (0 or 1 per token; a token in
    the loss is one that the policy sampled) and, if known, `log_probs` (null where not in the
    loss), `evicted_at` (per token the index of the first token that no longer saw it; null: none),
    `position_ids`, and `sample` (whatever the row is a part of).

    From TRL's completions the columns `prompt_ids`, `completion_ids`, `logprobs` and `env_mask` are
    read, which a reward function can write by `log_extra`. Without them, and from verl's lines, the
    text is tokenized again.

    Args:
        path: .jsonl (ours, or verl's), .pt (slime) or .parquet (TRL).
        tokenizer: of the model; only text needs it.

    Raises:
        OSError: the file cannot be read.
        ImportError: .parquet without pyarrow.
        ValueError: anything else; names the file, the line or row and the field.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "batch.jsonl"
    >>> _ = file.write_text('{"token_ids": [5, 7], "loss_mask": [0, 1], "log_probs": [null, -1]}')
    >>> read_batch(file).rows[0].tokens.log_probs
    tensor([nan, -1.])
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, Any], Batch]] = {
        ".jsonl": _read_lines,
        ".pt": _read_slime,
        ".parquet": _read_trl,
    }
    if path.suffix not in readers:
        expected = ", ".join(readers)
        raise ValueError(f"{path}: expected {expected}, got {path.suffix or 'no suffix'}")
    batch = readers[path.suffix](path, tokenizer)
    if not batch.rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    return batch


@contextmanager
def _named(path: Path, where: str) -> Iterator[None]:
    """Errors inside name the file and the place."""
    try:
        yield
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        text = f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}, {where}: {text}") from None


def _row(where: str, said: Mapping[str, Any]) -> BatchRow:
    """A row from the fields of our JSON lines; raises with the name of a field."""
    log_probs = said.get("log_probs")
    if log_probs is not None:
        if not isinstance(log_probs, (Sequence, Tensor)) or isinstance(log_probs, str):
            raise TypeError(f"log_probs: expected a list, got {type(log_probs).__name__}")
        log_probs = [float("nan") if value is None else value for value in log_probs]
        if not log_probs:
            log_probs = torch.zeros(0)
    tokens = TokenRow(
        said["token_ids"], said["loss_mask"], log_probs=log_probs, sample=said.get("sample")
    )
    if len(tokens) == 0:
        raise ValueError("token_ids: expected at least one token, got none")
    if bool(tokens.loss_mask[0]):
        raise ValueError("loss_mask: the first token is in the loss, but nothing predicts it")
    count = len(tokens)
    expiry = said.get("evicted_at")
    if expiry is not None:
        expiry = _integers("evicted_at", expiry, count, none=count).clamp(max=count)
        own = torch.arange(count)
        if bool((expiry <= own).any()):
            token = int((expiry <= own).nonzero()[0])
            raise ValueError(
                f"evicted_at: expected more than its own index {token} for token {token}, which "
                f"sees itself, got {int(expiry[token])}"
            )
        expiry = expiry.int()
    positions = said.get("position_ids")
    if positions is not None:
        positions = _integers("position_ids", positions, count)
        if int(positions.min()) < 0:
            raise ValueError(f"position_ids: expected 0 or more, got {int(positions.min())}")
    return BatchRow(tokens, where, expiry, positions)


def _integers(name: str, values: Any, count: int, none: int | None = None) -> Tensor:
    """int64 `[count]`; None among the values stands for `none`, where there is one."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(f"{name}: expected {count} values like token_ids, got {got}")
    filled = [none if value is None else value for value in values]
    for value in filled:
        if type(value) is not int or abs(value) >= 2**31:
            raise TypeError(f"{name}: expected integers, got {value!r}")
    return torch.tensor(filled, dtype=torch.int64)


def _read_lines(path: Path, tokenizer: Any) -> Batch:
    """Our JSON lines, or verl's; one file holds one kind."""
    rows: list[BatchRow] = []
    kinds: set[str] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"line {number}"
        if not line.strip():
            continue
        with _named(path, where):
            try:
                said = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"expected JSON ({error})") from None
            if not isinstance(said, dict):
                raise ValueError(f"expected an object, got {type(said).__name__}")
            if "token_ids" not in said and {"input", "output"} <= said.keys():
                kinds.add("verl")
                sample = said.get("uid", said.get("request_id"))
                rows.append(_from_text(where, said, ("input", "output"), tokenizer, sample))
            else:
                kinds.add("JSON lines")
                unknown = sorted(said.keys() - set(FIELDS))
                if unknown and "token_ids" in said:
                    known = ", ".join(FIELDS)
                    raise ValueError(f"{unknown[0]}: expected one of {known}")
                rows.append(_row(where, said))
            if len(kinds) > 1:
                raise ValueError("token_ids: expected in all lines or in none")
    verl = kinds == {"verl"}
    return Batch(tuple(rows), "verl's generations" if verl else "JSON lines", has_ids=not verl)


def _from_text(
    where: str, said: Mapping[str, Any], names: tuple[str, str], tokenizer: Any, sample: Any
) -> BatchRow:
    """A row whose prompt and completion are text, or messages of a conversation."""
    if tokenizer is None:
        raise ValueError(f"{names[0]}: is text, and the model has no tokenizer")
    prompt, completion = (_text(name, said[name], tokenizer) for name in names)
    before, after = (tokenizer.encode(x, add_special_tokens=False) for x in (prompt, completion))
    mask = [False] * len(before) + [True] * len(after)
    if mask and not before:
        mask[0] = False  # nothing predicts it
    return _row(where, {"token_ids": before + after, "loss_mask": mask, "sample": sample})


def _text(name: str, said: Any, tokenizer: Any) -> str:
    if isinstance(said, str):
        return said
    try:
        messages = [dict(message) for message in said]
        if name == "prompt":
            made = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return str(made)
        return "".join(message["content"] for message in messages)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected text, or messages that the tokenizer's chat template takes ({error})"
        ) from None


def _read_slime(path: Path, tokenizer: Any) -> Batch:
    """`{"rollout_id", "samples": [Sample.to_dict()]}`, by torch.save.

    `loss_mask` and `rollout_log_probs` are of the last `response_length` tokens.
    """
    try:
        samples = torch.load(path, map_location="cpu", weights_only=True)["samples"]
        if not all(isinstance(sample, dict) for sample in samples):
            raise TypeError("samples: expected a list of dicts")
    except OSError:
        raise
    except Exception as error:  # whatever torch.load raises for bytes that it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected slime's debug rollout data ({reason})") from None
    rows = []
    for number, said in enumerate(samples):
        where = f"sample {number}"
        with _named(path, where):
            ids = _list("tokens", said["tokens"])
            response = said["response_length"]
            if type(response) is not int or not 0 <= response <= len(ids):
                raise ValueError(
                    f"response_length: expected 0 to {len(ids)}, the tokens, got {response!r}"
                )
            if len(ids) == 0:
                continue  # aborted before anything was written
            before = len(ids) - response
            own = _behind(said, "loss_mask", response, [1] * response)
            log_probs = _behind(said, "rollout_log_probs", response, None)
            if said.get("remove_sample"):
                own = [0] * response
            made = {
                "token_ids": ids,
                "loss_mask": [0] * before + own,
                "log_probs": None if log_probs is None else [None] * before + log_probs,
                "sample": said.get("rollout_id"),
            }
            rows.append(_row(where, made))
    return Batch(tuple(rows), "slime's debug rollout data", has_ids=True)


def _list(name: str, values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return list(values.tolist())
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected a list, got {type(values).__name__}")
    return list(values)


def _behind(said: Mapping[str, Any], name: str, count: int, default: Any) -> Any:
    """The values of the last `count` tokens, or the default where there are none."""
    if said.get(name) is None:
        return default
    values = _list(name, said[name])
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} values, got {len(values)}")
    return values


def _read_trl(path: Path, tokenizer: Any) -> Batch:
    """A table of completions: text, or ids where a reward function logged them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError("pyarrow is not installed (`pip install mem1-kernels[data]`)") from None
    try:
        table = parquet.read_table(path).to_pylist()
    except OSError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected TRL's table of completions ({reason})") from None
    has_ids = bool(table) and {"prompt_ids", "completion_ids"} <= table[0].keys()
    rows = []
    for number, said in enumerate(table):
        where = f"row {number}"
        with _named(path, where):
            if not has_ids:
                rows.append(_from_text(where, said, ("prompt", "completion"), tokenizer, None))
                continue
            before = _list("prompt_ids", said["prompt_ids"])
            after = _list("completion_ids", said["completion_ids"])
            own = _behind(said, "env_mask", len(after), [1] * len(after))
            log_probs = _behind(said, "logprobs", len(after), None)
            made = {
                "token_ids": before + after,
                "loss_mask": [0] * len(before) + own,
                "log_probs": None if log_probs is None else [None] * len(before) + log_probs,
            }
            rows.append(_row(where, made))
    return Batch(tuple(rows), "TRL's completions", has_ids)
