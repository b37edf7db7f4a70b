"""A server on a loopback port with a scripted engine behind it, and what its answers are checked with."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import torch

from autodeploy.compile.program import NamedGraph, Program
from autodeploy.config import EngineOptions
from autodeploy.ops.state import PagedState
from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.server.run import DrainingServer
from autodeploy.server.served import ServedModel
from tests.runtime.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
ANSWER = "hello wörld 😀 the end"
ANSWER_IDS = TOKENIZER.encode(ANSWER)
EOS: int = TOKENIZER.hf.eos_token_id
VOCAB = 340
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    """A running server and the scripted engine behind it."""

    url: str
    fake: Any
    engine: AsyncEngine

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, **options)


Start = Callable[..., Server]
Serve = Callable[..., tuple[str, DrainingServer, ServedModel]]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def assert_error(response: httpx.Response, status: int, message: str, param: str | None = None) -> None:
    """Every answer that is no success looks like this."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["param"] == param


def random_engine(tokenizer: Any = TOKENIZER, *, max_model_len: int = 2048, **options: Any) -> Engine:
    """The real engine around a model whose next token depends on the last one, in a random way."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    names = ("input_ids", "position_ids", "cu_seqlens", "seq_lens", "logits_indices", "page_table_full")

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        batch = dict(zip(names, inputs, strict=False))
        return table[batch["input_ids"][0][batch["logits_indices"]]]

    program = Program(
        graphs={"text": NamedGraph("text", run, names, ("unused",))},
        states=[PagedState(name="unused", shape=(1,), dtype=torch.float32)],
        vocab_size=VOCAB,
        max_model_len=2048,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=(EOS,),
    )
    chosen = EngineOptions(**{"max_num_seqs": 16, "seed": 1, "kv_cache_memory_bytes": 2**20, **options})
    return Engine(program, chosen, max_model_len, None, GrammarCompiler(tokenizer, VOCAB, [EOS]))
