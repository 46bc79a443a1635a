"""The loop around the kernels: tags, environments, retrieval, scoring and the agent itself.

`MemoryEfficientAgent` runs tasks; `python -m mem1_kernels.agent.evaluate` measures it. `make_world`
makes a task by its name; environments stand in modules of their own: `qa`, `factbook`, `webshop`,
`tasks`.
"""

from mem1_kernels._text import printable, valid_text
from mem1_kernels.agent.agent import MemoryEfficientAgent, resolve_model
from mem1_kernels.agent.environment import (
    Environment,
    EnvironmentBatch,
    Step,
    ToolError,
    observation_ids,
)
from mem1_kernels.agent.episodes import Episodes, Result, TurnRecord
from mem1_kernels.agent.memory import Notes, UserMemory
from mem1_kernels.agent.qa import QATask, Question, RetrievalQA, compose, load_questions
from mem1_kernels.agent.retrieval import BM25, Passage, RetrievalServer, open_retriever
from mem1_kernels.agent.tags import MEM1, PAPER, WEBSHOP, ParsedTurn, TagSet, TokenTags
from mem1_kernels.agent.text import TextCodec
from mem1_kernels.agent.world import World, make_world
from mem1_kernels.rollout import Engine, EngineError, Generation, HFEngine, ServerEngine

__all__ = [
    "BM25",
    "MEM1",
    "PAPER",
    "WEBSHOP",
    "Engine",
    "EngineError",
    "Environment",
    "EnvironmentBatch",
    "Episodes",
    "Generation",
    "HFEngine",
    "MemoryEfficientAgent",
    "ParsedTurn",
    "Notes",
    "Passage",
    "QATask",
    "Question",
    "Result",
    "RetrievalQA",
    "RetrievalServer",
    "ServerEngine",
    "Step",
    "TagSet",
    "TextCodec",
    "TokenTags",
    "ToolError",
    "TurnRecord",
    "UserMemory",
    "World",
    "compose",
    "load_questions",
    "make_world",
    "observation_ids",
    "open_retriever",
    "printable",
    "resolve_model",
    "valid_text",
]
