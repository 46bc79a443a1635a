"""The loop around the kernels: tags, environments, retrieval, scoring and the agent itself.

`MemoryEfficientAgent` runs tasks; `python -m mem1_kernels.agent.evaluate` measures it. Environments
and tasks stand in their own modules: `qa`, `factbook`, `webshop`, `tasks`. `make_world` makes a
task by its name.
"""

from mem1_kernels.agent.agent import MemoryEfficientAgent, Result, TurnRecord, resolve_model
from mem1_kernels.agent.engine import Engine, EngineError, Generation, HFEngine, ServerEngine
from mem1_kernels.agent.environment import Environment, EnvironmentBatch, Step, ToolError
from mem1_kernels.agent.qa import QATask, Question, RetrievalQA, compose, load_questions
from mem1_kernels.agent.retrieval import BM25, Passage, RetrievalServer, open_retriever
from mem1_kernels.agent.tags import MEM1, PAPER, WEBSHOP, TagSet, TokenTags
from mem1_kernels.agent.world import World, make_world

__all__ = [
    "BM25",
    "MEM1",
    "PAPER",
    "WEBSHOP",
    "Engine",
    "EngineError",
    "Environment",
    "EnvironmentBatch",
    "Generation",
    "HFEngine",
    "MemoryEfficientAgent",
    "Passage",
    "QATask",
    "Question",
    "Result",
    "RetrievalQA",
    "RetrievalServer",
    "ServerEngine",
    "Step",
    "TagSet",
    "TokenTags",
    "ToolError",
    "TurnRecord",
    "World",
    "compose",
    "load_questions",
    "make_world",
    "open_retriever",
    "resolve_model",
]
