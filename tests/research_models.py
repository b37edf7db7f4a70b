"""Models that no library knows, written as a research group would ship them: plain modules, prefill only, no cache.

Our own code, from the papers' descriptions. They stand for remote code: each maps token ids `[1, T]` to logits and is
deployed as it is. `open_elm` (arXiv 2404.14619) scales heads and widths from layer to layer; `puzzle` (arXiv
2411.19146, behind DeciLM and several Nemotron models) leaves out, narrows or linearises single blocks;
`nemotron_flash` (arXiv 2511.18890, without its meta tokens) mixes DeltaNet, Mamba-2 and attention. Recurrences are
Python loops over tokens, as in a paper's reference code. Sizes are tiny unless they are given: `seed_models.py` gives
the published ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 96


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Gated(nn.Module):
    """A gated SiLU feed-forward block, gate and up projection in one matrix."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_and_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions from the row's start, grouped queries, optional QK norm."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, size: int, norm: bool = False):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * size, bias=False)
        self.out = nn.Linear(heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size) if norm else nn.Identity()
        self.k_norm = RMSNorm(size) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.q_norm(q)), rotate(self.k_norm(k))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, x `[B, heads, T, size]`."""
    length, size = x.shape[2:]
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.arange(length, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DeltaNet(nn.Module):
    """Linear attention whose memory is corrected towards each value (arXiv 2406.06484), one step per token."""

    def __init__(self, hidden: int, heads: int, size: int):
        super().__init__()
        self.heads, self.size = heads, size
        inner = 3 * heads * size
        self.qkv = nn.Linear(hidden, inner, bias=False)
        self.beta = nn.Linear(hidden, heads, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3, bias=False)
        self.norm = RMSNorm(size)
        self.out = nn.Linear(heads * size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = F.silu(self.conv(self.qkv(x).transpose(1, 2))[..., :length]).transpose(1, 2)
        q, k, v = qkv.reshape(batch, length, 3, self.heads, self.size).unbind(2)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        mixed = self.mix(q * self.size**-0.5, k, v, torch.sigmoid(self.beta(x)))
        return self.out(self.norm(mixed).reshape(batch, length, -1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        memory = q.new_zeros(q.shape[0], self.heads, self.size, self.size)
        rows = []
        for t in range(q.shape[1]):
            wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], memory)
            memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
            rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
        return torch.stack(rows, dim=1)


class Mamba2(nn.Module):
    """A state-space mixer with one decay per head (arXiv 2405.21060), one step per token."""

    def __init__(self, hidden: int, heads: int, size: int, states: int):
        super().__init__()
        self.heads, self.size, self.states = heads, size, states
        inner = heads * size
        self.project = nn.Linear(hidden, 2 * inner + 2 * states + heads, bias=False)
        self.conv = nn.Conv1d(inner + 2 * states, inner + 2 * states, 4, groups=inner + 2 * states, padding=3)
        self.log_rate = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        inner = self.heads * self.size
        z, signal, dt = self.project(x).split([inner, inner + 2 * self.states, self.heads], dim=-1)
        signal = F.silu(self.conv(signal.transpose(1, 2))[..., :length]).transpose(1, 2)
        u, b, c = signal.split([inner, self.states, self.states], dim=-1)
        u = u.view(batch, length, self.heads, self.size)
        mixed = self.mix(u, F.softplus(dt + self.dt_bias), b, c)
        mixed = mixed + u * self.skip[:, None]
        return self.out(self.norm(mixed.reshape(batch, length, inner) * F.silu(z)))

    def mix(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        decay = torch.exp(-dt * self.log_rate.exp())
        state = u.new_zeros(u.shape[0], self.heads, self.size, self.states)
        mixed = torch.zeros_like(u)
        for t in range(u.shape[1]):
            fresh = (dt[:, t, :, None] * u[:, t])[..., None] * b[:, t, None, None, :]
            state = decay[:, t, :, None, None] * state + fresh
            mixed[:, t] = (state * c[:, t, None, None, :]).sum(-1)
        return mixed


class Block(nn.Module):
    """A residual branch behind a norm; without a body it passes its input on."""

    def __init__(self, hidden: int, body: nn.Module | None):
        super().__init__()
        self.norm = None if body is None else RMSNorm(hidden)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x if self.body is None or self.norm is None else x + self.body(self.norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, hidden: int, bodies: list[nn.Module | None], tied: bool = False, vocab: int = VOCAB):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, body) for body in bodies)
        self.norm = RMSNorm(hidden)
        self.head = None if tied else nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x @ self.embedding.weight.T if self.head is None else self.head(x)


def open_elm(
    hidden: int = 32,
    size: int = 8,
    heads: Sequence[int] = (2, 2, 4, 4),
    widths: Sequence[int] = (32, 48, 64, 80),
    group: int = 2,
    vocab: int = VOCAB,
) -> Decoder:
    """Heads and widths grow with depth; queries and keys are normalised; the head is the embedding."""
    bodies: list[nn.Module | None] = []
    for count, width in zip(heads, widths, strict=True):
        bodies += [Attention(hidden, count, count // group, size, norm=True), Gated(hidden, width)]
    return Decoder(hidden, bodies, tied=True, vocab=vocab)


@dataclass(frozen=True)
class PuzzleLayer:
    """What a search left of one layer: a number of key-value heads or a width, `linear`, or nothing."""

    attention: int | str | None
    feed_forward: int | str | None


PUZZLE = (
    PuzzleLayer(attention=2, feed_forward=80),
    PuzzleLayer(attention=None, feed_forward=40),
    PuzzleLayer(attention=1, feed_forward=None),
    PuzzleLayer(attention="linear", feed_forward="linear"),
    PuzzleLayer(attention=4, feed_forward=24),
)


def puzzle(
    hidden: int = 32,
    layers: Sequence[PuzzleLayer] = PUZZLE,
    heads: int = 4,
    size: int = 8,
    vocab: int = VOCAB,
) -> Decoder:
    """Every layer has its own key-value heads and width; some blocks are one matrix, some are left out."""

    def body(kind: int | str | None, full: nn.Module | None) -> nn.Module | None:
        return nn.Linear(hidden, hidden, bias=False) if kind == "linear" else full

    bodies: list[nn.Module | None] = []
    for layer in layers:
        kv_heads, width = layer.attention, layer.feed_forward
        attention = Attention(hidden, heads, kv_heads, size) if isinstance(kv_heads, int) else None
        bodies += [body(kv_heads, attention), body(width, Gated(hidden, width) if isinstance(width, int) else None)]
    return Decoder(hidden, bodies, vocab=vocab)


def nemotron_flash(
    hidden: int = 32,
    delta_net: type[DeltaNet] = DeltaNet,
    mamba2: type[Mamba2] = Mamba2,
    pattern: str = "dfmafdm",
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 8,
    mamba_heads: int = 4,
    mamba_size: int = 8,
    states: int = 16,
    width: int = 64,
    tied: bool = False,
    vocab: int = VOCAB,
) -> Decoder:
    """DeltaNet, feed-forward, Mamba-2 and attention blocks in an order that a search found: one letter each.

    Args:
        heads, kv_heads, size: of attention; DeltaNet has as many heads of that size.
    """
    make = {
        "d": lambda: delta_net(hidden, heads, size),
        "m": lambda: mamba2(hidden, mamba_heads, mamba_size, states),
        "a": lambda: Attention(hidden, heads, kv_heads, size),
        "f": lambda: Gated(hidden, width),
    }
    return Decoder(hidden, [make[letter]() for letter in pattern], tied, vocab)


def with_random_weights(model: nn.Module) -> nn.Module:
    """The model, float32 and in eval mode, with weights from torch's generator that make every part matter."""
    model.float().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model
