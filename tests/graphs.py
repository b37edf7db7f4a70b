"""Small modules to trace, and running a graph at any level with its real weights."""

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autodeploy.capture.export import capture
from autodeploy.capture.hooks import packed_row
from autodeploy.checkpoint.index import ModuleReader
from autodeploy.checkpoint.recipe import evaluate
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import find_op

LENGTHS = [3, 6, 4]


def run(graph: ModelGraph, model: nn.Module, lengths: list[int] = LENGTHS, seed: int = 0) -> Tensor:
    """The graph's result for random tokens in sequences of these lengths, its weights made from the model's."""
    reader = ModuleReader(model)
    for name, recipe in graph.weights.items():
        setattr(graph.module, name, nn.Parameter(evaluate(recipe, reader.read).clone(), requires_grad=False))
    _, position_ids, cu_seqlens = packed_row(lengths)
    input_ids = torch.randint(0, 32, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    values = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": cu_seqlens}
    with torch.no_grad():
        return fx.Interpreter(graph.module).run(*[values[str(node.target)] for node in graph.inputs()])


def counts(graph: ModelGraph) -> Counter[str]:
    """How often each op of ours occurs."""
    found = (find_op(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return Counter(op.name for op in found if op is not None)


class Sketch(nn.Module):
    """Embedding, a body to fill in, and a head: the smallest thing that captures as a language model."""

    def __init__(self, body: Callable[..., Tensor] | None = None, hidden: int = 16, **modules: nn.Module | Tensor):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, hidden)
        self.head = nn.Linear(hidden, 32, bias=False)
        self.body = body
        for name, module in modules.items():
            if isinstance(module, nn.Module | nn.Parameter):
                setattr(self, name, module)
            else:
                self.register_buffer(name, module, persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        if self.body is not None:
            hidden = self.body(self, hidden)
        return self.head(hidden)


class Attention(nn.Module):
    """Attention as people write it: `core(q, k, v) -> out` on `[1, heads, T, dim]`."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: int = 16, kv_heads: int = 4):
        super().__init__()
        self.core, self.kv_heads = core, kv_heads
        self.q = nn.Linear(hidden, 16, bias=False)
        self.k = nn.Linear(hidden, 4 * kv_heads, bias=False)
        self.v = nn.Linear(hidden, 4 * kv_heads, bias=False)
        self.o = nn.Linear(16, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 4, 4).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, 4).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, 4).transpose(1, 2)
        return x + self.o(self.core(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


def attention_model(core: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int = 4) -> nn.Module:
    """A one-layer model around an attention core."""
    torch.manual_seed(0)
    layer = Attention(core, kv_heads=kv_heads)
    return Sketch(lambda self, x: self.layer(x), layer=layer).eval()


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def captured(model: nn.Module) -> ModelGraph:
    return capture(model.eval())
