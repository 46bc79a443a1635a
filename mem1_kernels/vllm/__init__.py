"""vLLM with contexts that are pruned in place, exactly.

    VLLMEngine(model)                              vLLM in this process, for rollouts and agents
    VLLMServerEngine("http://127.0.0.1:8000")      a server: python -m mem1_kernels.vllm.serve MODEL
    vllm.LLM(model, **engine_options())            your own vLLM, with sessions that can drop tokens

A session is one of vLLM's resumable requests. At a boundary its dropped tokens leave vLLM's own KV
cache: survivors move into the holes, positions count on, and nothing is computed again. The parts:

    slots      which token lies where, and which slots a drop moves (plain numpy)
    scheduler  decides, edits block tables, ends a session that cannot go on
    worker     moves the slots in all layers before a step; positions count on
    turns      a row's turns as chunks of a session
    engine     the engine in this process
    endpoint   sessions over HTTP: routes of the server; serve starts one
    client     the engine over HTTP
    support    what is refused, by name

Importing this package does not import vLLM.
"""

from mem1_kernels.vllm.client import VLLMServerEngine
from mem1_kernels.vllm.engine import VLLMEngine, engine_options
from mem1_kernels.vllm.support import TESTED, Unsupported

__all__ = ["TESTED", "Unsupported", "VLLMEngine", "VLLMServerEngine", "engine_options"]
