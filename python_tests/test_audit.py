"""The auditor: what it counts equals a count by hand, and what it reads is what frameworks dump."""

from __future__ import annotations

import json
import re

import pytest
import torch
from agent_models import make_model, make_tokenizer

from mem1_kernels import keep_all, mem1, visible
from mem1_kernels.audit import audit, read_batch
from mem1_kernels.audit.__main__ import main
from mem1_kernels.rollout import Generation, HFEngine


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with its tokenizer: (folder, model, tokenizer)."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


def rollouts(model, retention=mem1, positions="kept", rows=3):
    engine = HFEngine(model, positions=positions)
    prompts = [[40 + row, 41, 42, 43, 44] for row in range(rows)]

    def respond(turns):
        return [[60 + turn.row, 61, 62, 63] for turn in turns]

    return engine.run(
        prompts, respond, Generation(retention=retention, max_turns=4, max_new_tokens=5, seed=0)
    )


def lines_of(made, evicted=True):
    """Rollouts as JSON lines."""
    said = []
    for number, rollout in enumerate(made):
        layout = rollout.layout
        log_probs = [
            value if own else None
            for value, own in zip(
                rollout.log_probs.tolist(), layout.loss_mask.tolist(), strict=True
            )
        ]
        line = {
            "token_ids": layout.token_ids.tolist(),
            "loss_mask": layout.loss_mask.int().tolist(),
            "log_probs": log_probs,
            "sample": number,
        }
        if evicted:
            end = layout.num_tokens
            line["evicted_at"] = [None if e == end else e for e in layout.expiry.tolist()]
        said.append(line)
    return said


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_pruned_rollout_leaks_into_a_causal_trainer_and_not_into_an_exact_one(
    saved, tmp_path, capsys
):
    folder, model, _ = saved
    made = rollouts(model)
    file = write(tmp_path / "batch.jsonl", lines_of(made))
    assert main([folder, file]) == 1
    said = capsys.readouterr().out
    assert "fail: tokens in the loss see tokens that were gone\n      more than 1.00% of" in said
    assert main([folder, file, "--trainer", "exact"]) == 0
    assert "pass: the trainer (exact) sees what the rollout saw" in capsys.readouterr().out
    assert main([folder, file, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "fail" and len(found["faults"]) == 2

    # Leaks by hand: what a causal mask shows the query before a token in the loss, and was gone.
    pairs = tokens = 0
    differences = []
    exact = model.double()
    for rollout in made:
        layout = rollout.layout
        seen = visible(layout.expiry)
        causal = torch.ones_like(seen).tril()
        generated = layout.loss_mask.nonzero().flatten()
        leaked = (causal & ~seen)[generated - 1].sum(1)
        pairs += int(leaked.sum())
        tokens += int((leaked > 0).sum())
        with torch.no_grad():
            logits = exact(layout.token_ids[None], use_cache=False).logits[0]
        log_probs = logits.log_softmax(1)[generated - 1, layout.token_ids[generated]]
        differences.append(log_probs - rollout.log_probs[generated])
    model.float()
    assert (found["leaked_pairs"], found["leaking_tokens"]) == (pairs, tokens)
    assert pairs > 0
    difference = torch.cat(differences)
    gap = found["causal"]
    assert gap["tokens"] == len(difference) == found["loss_tokens"]
    assert gap["mean"] == pytest.approx(float(difference.abs().mean()), abs=2e-5)
    assert gap["largest"] == pytest.approx(float(difference.abs().max()), abs=2e-5)
    ratio = difference.exp()
    assert gap["outside"] == pytest.approx(float(((ratio < 0.8) | (ratio > 1.2)).double().mean()))
    assert gap["outside"] > 0.01
    assert found["exact"]["largest"] < 2e-5 and found["exact"]["outside"] == 0


def test_full_context_and_text_that_is_sent_again_pass(saved, tmp_path, capsys):
    folder, model, _ = saved
    file = write(tmp_path / "full.jsonl", lines_of(rollouts(model, keep_all), evicted=False))
    assert main([folder, file]) == 0
    assert "leaks      none" in capsys.readouterr().out

    # An engine that sends the text again: a row per turn, as trainers make them.
    lines = []
    for rollout in rollouts(model, positions="reprefill"):
        layout = rollout.layout
        seen = visible(layout.expiry)
        ends = (layout.loss_mask[:-1] & ~layout.loss_mask[1:]).nonzero().flatten().tolist()
        if bool(layout.loss_mask[-1]):
            ends.append(layout.num_tokens - 1)
        for end in ends:
            places = seen[end].nonzero().flatten()
            own = places[layout.loss_mask[places]]
            own = own[own > end - 5]
            mask = [int(place) in own.tolist() for place in places]
            log_probs = [float(rollout.log_probs[layout.source[p]]) for p in places]
            lines.append(
                {
                    "token_ids": layout.token_ids[places].tolist(),
                    "loss_mask": mask,
                    "log_probs": [x if y else None for x, y in zip(log_probs, mask, strict=True)],
                }
            )
    file = write(tmp_path / "turns.jsonl", lines)
    assert main([folder, file, "--json", "--tokens", "40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["causal"]["largest"] < 2e-5 and found["causal"] == found["exact"]
    assert found["tree_tokens"] < found["tokens"] and found["tree_flops"] < found["flops"]


def test_what_a_tree_saves_is_counted(saved, tmp_path):
    """By hand, for two rows that share 3 of 5 tokens."""
    _, model, tokenizer = saved
    rows = [{"token_ids": [5, 6, 7, x, 9], "loss_mask": [0, 0, 0, 1, 1]} for x in (8, 20)]
    found = audit(model, read_batch(write(tmp_path / "two.jsonl", rows)), tokenizer=tokenizer)
    assert (found.tokens, found.tree_tokens, found.causal) == (10, 7, None)
    width, wide, layers, kv = 32, 48, 2, 16
    layer = width * (width + 2 * kv + width) + 3 * width * wide
    head = width * len(tokenizer)
    pairs = 14 * width * layers
    assert found.flops == 6 * (layers * layer * 10 + head * 4) + pairs * 2 * 15
    # of the tree: 6 pairs of the prefix, and 4 + 5 of each branch
    assert found.tree_flops == 6 * (layers * layer * 7 + head * 4) + pairs * (6 + 2 * 9)


def test_positions_of_the_rollout_are_honoured(saved, tmp_path, capsys):
    folder, model, _ = saved
    ids, positions = [5, 6, 7, 8, 9], [0, 1, 4, 5, 6]
    with torch.no_grad():
        logits = model(
            torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False,
            attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(),
        ).logits[0]  # fmt: skip
    log_probs = logits.log_softmax(1)[range(4), ids[1:]].tolist()
    line = {
        "token_ids": ids,
        "loss_mask": [0, 1, 1, 1, 1],
        "log_probs": [None, *log_probs],
        "position_ids": positions,
    }
    file = write(tmp_path / "moved.jsonl", [line])
    assert main([folder, file, "--trainer", "exact"]) == 0
    assert "3 tokens stood elsewhere" in capsys.readouterr().out
    assert main([folder, file]) == 1
    assert "tokens stand at other positions" in capsys.readouterr().out


def test_drift_is_told_where_it_is(saved, tmp_path, capsys):
    folder, _, tokenizer = saved
    whole = tokenizer.encode(" question", add_special_tokens=False)
    letters = [tokenizer.encode(x, add_special_tokens=False)[0] for x in "qu"]
    split = [*whole[:1], *letters]
    text = tokenizer.decode(split)
    assert tokenizer.encode(text, add_special_tokens=False) != split, "not a drift: choose others"
    rows = [{"token_ids": x, "loss_mask": [0] * len(x)} for x in ([5, 6], split)]
    rows[0]["token_ids"] = tokenizer.encode("What is it", add_special_tokens=False)
    rows[0]["loss_mask"] = [0] * len(rows[0]["token_ids"])
    assert main([folder, write(tmp_path / "drift.jsonl", rows)]) == 3
    said = capsys.readouterr().out
    assert re.search(r"1 rows change when tokenized again, first at line 2, token \d", said)
    assert "cannot tell: no log-probs were recorded" in said


def slime_sample(model, ids, response, **changes):
    """As `Sample.to_dict` of slime has it, the fields that matter here and some others."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(1)
    log_probs = logits[range(len(ids) - 1), ids[1:]][len(ids) - response - 1 :].tolist()
    return {
        "group_index": 0,
        "index": 3,
        "rollout_id": 7,
        "prompt": "?",
        "tokens": ids,
        "response": "...",
        "response_length": response,
        "reward": 1.0,
        "loss_mask": None,
        "rollout_log_probs": log_probs,
        "weight_versions": [],
        "remove_sample": False,
        "status": "completed",
        "metadata": {},
        "spec_info": {"spec_verify_ct": 0},
        **changes,
    }


def test_slime(saved, tmp_path, capsys):
    folder, model, _ = saved
    samples = [
        slime_sample(model, [5, 6, 7, 8, 9, 10], 4),
        slime_sample(model, [5, 6, 7, 18, 19], 3, loss_mask=[1, 0, 1]),
        slime_sample(model, [5, 6, 30], 1, remove_sample=True),
        slime_sample(model, [5, 6, 31], 1, tokens=[], response_length=0, rollout_log_probs=[]),
    ]
    path = tmp_path / "0.pt"
    torch.save({"rollout_id": 0, "samples": samples}, path)
    batch = read_batch(path)
    assert batch.source == "slime's debug rollout data" and len(batch.rows) == 3
    assert [row.tokens.loss_mask.int().tolist() for row in batch.rows] == [
        [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0],
    ]  # fmt: skip
    assert {row.tokens.sample for row in batch.rows} == {7}
    assert main([folder, str(path)]) == 0
    assert "slime's debug rollout data: 3 rows, 14 tokens, 6 in the loss" in capsys.readouterr().out
    samples[0]["rollout_log_probs"][1] -= 1.0
    torch.save({"rollout_id": 0, "samples": samples}, path)
    assert main([folder, str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["causal"]["largest"] == pytest.approx(1, abs=1e-5)
    assert found["causal"]["outside"] == pytest.approx(1 / 6)
    assert main([folder, str(path), "--allowed", "0.2"]) == 0


def test_verl(saved, tmp_path, capsys):
    """Text without special tokens: what they share can be counted, log-probs cannot."""
    folder, _, tokenizer = saved
    lines = [
        {"input": "What is it?", "output": x, "gts": "42", "score": 1.0, "step": 3, "uid": "a_0_0"}
        for x in (" It is a question", " It is it")
    ]
    file = write(tmp_path / "3.jsonl", lines)
    assert main([folder, file]) == 3
    said = capsys.readouterr().out
    assert "verl's generations: 2 rows" in said and "the file holds text, not ids" in said
    batch = read_batch(file, tokenizer)
    shared = len(tokenizer.encode("What is it?", add_special_tokens=False))
    assert int((~batch.rows[0].tokens.loss_mask).sum()) == shared


@pytest.mark.parametrize("conversation", [False, True])
def test_trl_text(saved, tmp_path, conversation, capsys):
    pandas = pytest.importorskip("pandas")
    folder, _, tokenizer = saved
    prompts, completions = ["What is it?"] * 2, [" A question", " It"]
    if conversation:
        prompts = [[{"role": "user", "content": x}] for x in prompts]
        completions = [[{"role": "assistant", "content": x}] for x in completions]
    table = {"step": [1, 1], "prompt": prompts, "completion": completions, "advantage": [1.0, -1.0]}
    path = tmp_path / "completions_00001.parquet"
    pandas.DataFrame(table).to_parquet(path)
    code = main([folder, str(path)])
    said = capsys.readouterr()
    if conversation:  # this tokenizer has no chat template
        assert code == 2 and "row 0: prompt: expected text, or messages that" in said.err
        tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
        batch = read_batch(path, tokenizer)
        assert tokenizer.decode(batch.rows[0].tokens.token_ids) == "<What is it?> A question"
        tokenizer.chat_template = None
    else:
        assert code == 3 and "TRL's completions: 2 rows" in said.out


def test_trl_ids(saved, tmp_path):
    pandas = pytest.importorskip("pandas")
    folder, model, _ = saved
    sample = slime_sample(model, [5, 6, 7, 8, 9], 3)
    table = {
        "prompt": ["?"],
        "completion": ["!"],
        "prompt_ids": [[5, 6]],
        "completion_ids": [[7, 8, 9]],
        "logprobs": [sample["rollout_log_probs"]],
        "env_mask": [[1, 0, 1]],
    }
    path = tmp_path / "completions_00001.parquet"
    pandas.DataFrame(table).to_parquet(path)
    (row,) = read_batch(path).rows
    assert row.tokens.loss_mask.int().tolist() == [0, 0, 1, 0, 1]
    assert main([folder, str(path)]) == 0
    table["logprobs"] = [[-1.0]]
    pandas.DataFrame(table).to_parquet(path)
    with pytest.raises(ValueError, match="row 0: logprobs: expected 3 values, got 1"):
        read_batch(path)


GOOD = {"token_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "log_probs": [None, -1.0, -2.0]}
WRONG = {
    "line 2: expected JSON": "{",
    "line 2: expected an object, got list": "[1]",
    "line 2: token_ids: missing": {"loss_mask": [1]},
    "line 2: loss_mask: missing": {"token_ids": [1, 2]},
    "line 2: logprobs: expected one of token_ids, loss_mask": {**GOOD, "logprobs": []},
    "line 2: token_ids: expected torch.int64": {**GOOD, "token_ids": [1.5, 2, 3]},
    "line 2: token_ids: expected ids >= 0, got -1": {**GOOD, "token_ids": [-1, 2, 3]},
    "line 2: token_ids: expected numbers": {**GOOD, "token_ids": [2**70, 2, 3]},
    "line 2: token_ids: expected at least one token": {"token_ids": [], "loss_mask": []},
    "line 2: token_ids: expected ids below": {**GOOD, "token_ids": [5, 6, 10**6]},
    "line 2: loss_mask: expected 3 values like token_ids, got 2": {**GOOD, "loss_mask": [0, 1]},
    "line 2: loss_mask: the first token is in the loss": {
        "token_ids": [5], "loss_mask": [1],
    },
    "line 2: log_probs: expected finite numbers": {**GOOD, "log_probs": [None, None, -1]},
    "line 2: log_probs: expected a list, got str": {**GOOD, "log_probs": "-1"},
    "line 2: evicted_at: expected 3 values like token_ids, got 1": {**GOOD, "evicted_at": [None]},
    "line 2: evicted_at: expected integers, got 'x'": {**GOOD, "evicted_at": [None, "x", 3]},
    "line 2: evicted_at: expected more than its own index 1 for token 1": {
        **GOOD, "evicted_at": [None, 1, 3],
    },
    "line 2: position_ids: expected integers, got None": {**GOOD, "position_ids": [None, 1, 2]},
    "line 2: position_ids: expected 0 or more": {**GOOD, "position_ids": [-1, 0, 1]},
    "line 2: token_ids: expected in all lines or in none": {"input": "a", "output": "b"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_line_is_named_in_one_line(saved, message, tmp_path, capsys):
    wrong = WRONG[message]
    path = tmp_path / "batch.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{wrong if isinstance(wrong, str) else json.dumps(wrong)}")
    assert main([saved[0], str(path)]) == 2
    said = capsys.readouterr()
    *loading, error = said.err.splitlines()
    assert said.out == "" and all("Loading weights" in line for line in loading if line)
    assert error.startswith("python -m mem1_kernels.audit: error: ") and message in error


def test_wrong_files_and_options_are_named_in_one_line(saved, tmp_path, capsys):
    folder = saved[0]
    torch.save({"samples": [{"tokens": [1, 2], "response_length": 3}]}, tmp_path / "long.pt")
    torch.save(
        {"samples": [{"tokens": [1, 2], "response_length": 1, "loss_mask": [1, 1]}]},
        tmp_path / "mask.pt",
    )
    torch.save([1], tmp_path / "list.pt")
    torch.save({"samples": [{"tokens": None, "response_length": 0}]}, tmp_path / "none.pt")
    torch.save({"samples": [{"tokens": [1, None], "response_length": 1}]}, tmp_path / "null.pt")
    (tmp_path / "bytes.pt").write_bytes(b"nothing")
    (tmp_path / "bytes.parquet").write_bytes(b"nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    good = write(tmp_path / "good.jsonl", [GOOD])
    cases = {
        "sample 0: response_length: expected 0 to 2, the tokens, got 3": [tmp_path / "long.pt"],
        "sample 0: loss_mask: expected 1 values, got 2": [tmp_path / "mask.pt"],
        "sample 0: tokens: expected a list, got NoneType": [tmp_path / "none.pt"],
        "sample 0: token_ids: expected": [tmp_path / "null.pt"],
        "list.pt: expected slime's debug rollout data": [tmp_path / "list.pt"],
        "bytes.pt: expected slime's debug rollout data": [tmp_path / "bytes.pt"],
        "bytes.parquet: expected TRL's table": [tmp_path / "bytes.parquet"],
        "empty.jsonl: expected at least one row": [tmp_path / "empty.jsonl"],
        "x.csv: expected .jsonl, .pt, .parquet, got .csv": [tmp_path / "x.csv"],
        "bytes.jsonl, line 1: expected JSON": [tmp_path / "bytes.jsonl"],
        "none.jsonl: No such file": [tmp_path / "none.jsonl"],
        "clip: expected more than 0 and less than 1": [good, "--clip", "2"],
        "temperature: expected more than 0": [good, "--temperature", "0"],
        "tokens: expected at least 1, got 0": [good, "--tokens", "0"],
        "device: ": [good, "--device", "nowhere"],
    }
    for message, arguments in cases.items():
        assert main([folder, *map(str, arguments)]) == 2, message
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("python -m mem1_kernels.audit: error: ")
    assert main([str(tmp_path / "nowhere"), good]) == 2
    assert "model: " in capsys.readouterr().err
    for arguments in (["--allowed", "2"], ["--trainer", "other"]):
        with pytest.raises(SystemExit) as stopped:
            main([folder, good, *arguments])
        assert stopped.value.code == 2


def test_a_model_without_a_tokenizer(saved, tmp_path, capsys):
    saved[1].save_pretrained(tmp_path / "model")
    good = write(tmp_path / "good.jsonl", [GOOD])
    assert main([str(tmp_path / "model"), good]) == 1  # made-up log-probs
    assert "drift not measured: the model has no tokenizer" in capsys.readouterr().out
    verl = write(tmp_path / "verl.jsonl", [{"input": "a", "output": "b"}])
    assert main([str(tmp_path / "model"), verl]) == 2
    assert "input: is text, and the model has no tokenizer" in capsys.readouterr().err
