"""Recurrent mixers as their authors write them: one loop over tokens, formulas from the papers, no cache.

Our own code, to stand for checkpoints that bring their own modules. Each mixer maps `[B, T, hidden]` to the same:
`WKV4` (arXiv 2305.13048), `WKV6` (arXiv 2404.05892), `WKV7` (arXiv 2503.14456) and `SLSTM` (arXiv 2405.04517).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.research_models import Decoder, Gated


def before(x: Tensor) -> Tensor:
    """Every token's predecessor, `[B, T, hidden]`; zeros before the first."""
    return F.pad(x, (0, 0, 1, -1))


class Shifted(nn.Module):
    """A projection of a mixture of a token and the one before it."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.share = nn.Parameter(torch.full((hidden,), 0.5))
        self.project = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.lerp(before(x), x, self.share))


class WKV4(nn.Module):
    """A weighed mean over earlier tokens per channel, kept relative to the largest weight."""

    def __init__(self, hidden: int):
        super().__init__()
        self.key, self.value, self.receptance = (Shifted(hidden, hidden) for _ in range(3))
        self.log_decay = nn.Parameter(torch.linspace(-3.0, 1.0, hidden))
        self.first = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.receptance(x)) * self.mix(self.key(x), self.value(x)))

    def mix(self, k: Tensor, v: Tensor) -> Tensor:
        aa = bb = torch.zeros_like(k[:, 0])
        pp, rows = torch.full_like(aa, -1e30), []
        for t in range(k.shape[1]):
            kt, vt = k[:, t], v[:, t]
            q = torch.maximum(pp, self.first + kt)
            e1, e2 = torch.exp(pp - q), torch.exp(self.first + kt - q)
            rows.append((e1 * aa + e2 * vt) / (e1 * bb + e2))
            ww = pp - torch.exp(self.log_decay)
            q = torch.maximum(ww, kt)
            e1, e2 = torch.exp(ww - q), torch.exp(kt - q)
            aa, bb, pp = e1 * aa + e2 * vt, e1 * bb + e2, q
        return torch.stack(rows, dim=1)


class NaiveWKV4(WKV4):
    """The same as two plain sums, as a paper's formula has it."""

    def mix(self, k: Tensor, v: Tensor) -> Tensor:
        decay = torch.exp(-torch.exp(self.log_decay))
        above, below, rows = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.empty_like(v)
        for t in range(k.shape[1]):
            now, weight = torch.exp(self.first + k[:, t]), torch.exp(k[:, t])
            rows[:, t] = (above + now * v[:, t]) / (below + now)
            above = decay * above + weight * v[:, t]
            below = decay * below + weight
        return rows


class WKV6(nn.Module):
    """Matrix states per head, a decay per channel that depends on the token, a bonus for the token itself."""

    def __init__(self, hidden: int, heads: int, size: int):
        super().__init__()
        self.shape = (heads, size)
        self.r, self.k, self.v, self.gate = (Shifted(hidden, heads * size) for _ in range(4))
        self.decay_down, self.decay_up = Shifted(hidden, 8), nn.Linear(8, heads * size)
        self.bonus = nn.Parameter(torch.zeros(heads, size))
        self.norm = nn.GroupNorm(heads, heads * size, eps=1e-5)
        self.out = nn.Linear(heads * size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        r, k, v = (part(x).view(batch, length, *self.shape) for part in (self.r, self.k, self.v))
        w = torch.exp(-torch.exp(self.decay_up(torch.tanh(self.decay_down(x))))).view_as(r)
        mixed = self.norm(self.mix(r, k, v, w).reshape(batch * length, -1)).view(batch, length, -1)
        return self.out(mixed * F.silu(self.gate(x)))

    def mix(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        state, rows = r.new_zeros(r.shape[0], *self.shape, self.shape[1]), []
        for t in range(r.shape[1]):
            fresh = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
            rows.append(r[:, t].unsqueeze(-2) @ (self.bonus.unsqueeze(-1) * fresh + state))
            state = w[:, t].unsqueeze(-1) * state + fresh
        return torch.cat(rows, dim=-2).reshape(r.shape[0], self.shape[0], -1, self.shape[1]).transpose(1, 2)


class WKV7(nn.Module):
    """Matrix states, values first, that are read under one key and written under others."""

    def __init__(self, hidden: int, heads: int, size: int):
        super().__init__()
        self.shape = (heads, size)
        self.r, self.k, self.v, self.w, self.a = (Shifted(hidden, heads * size) for _ in range(5))
        self.key_share = nn.Parameter(torch.ones(heads, size))
        self.rate_share = nn.Parameter(torch.ones(heads, size))
        self.bonus = nn.Parameter(torch.zeros(heads, size))
        self.norm = nn.GroupNorm(heads, heads * size, eps=1e-5)
        self.out = nn.Linear(heads * size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        r, k, v, w, a = (part(x).view(batch, length, *self.shape) for part in (self.r, self.k, self.v, self.w, self.a))
        decay, rate = torch.exp(-0.606531 * torch.sigmoid(w)), torch.sigmoid(a)
        removed = F.normalize(k * self.key_share, dim=-1)
        k = k * (1 + (rate - 1) * self.rate_share)
        mixed = self.mix(r, k, v, decay, removed, rate)
        mixed = self.norm(mixed.reshape(batch * length, -1)).view(batch, length, *self.shape)
        mixed = mixed + (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.out(mixed.flatten(-2))

    def mix(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, removed: Tensor, rate: Tensor) -> Tensor:
        state, rows = r.new_zeros(r.shape[0], *self.shape, self.shape[1]), torch.zeros_like(v)
        for t in range(r.shape[1]):
            erased = state @ -removed[:, t, :, :, None] @ (removed[:, t] * rate[:, t])[:, :, None]
            state = state * w[:, t, :, None] + erased + v[:, t, :, :, None] @ k[:, t, :, None]
            rows[:, t] = (state @ r[:, t].unsqueeze(-1)).squeeze(-1)
        return rows


class SLSTM(nn.Module):
    """Scalar memories with exponential gates; what a head gave for the last token reaches all gates of the next."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.gates = nn.Linear(hidden, 4 * hidden)
        self.recurrent = nn.Parameter(torch.randn(4, heads, self.size, self.size) * 0.1)
        self.norm = nn.GroupNorm(heads, hidden, eps=1e-5)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        gates = self.gates(x).view(batch, length, 4, self.heads, self.size)
        h, c, n, m = x.new_zeros(4, batch, self.heads, self.size).unbind(0)
        rows = []
        for t in range(length):
            mixed = gates[:, t] + torch.einsum("bnd,gnde->bgne", h, self.recurrent)
            z, i, f, o = mixed.unbind(1)
            f = F.logsigmoid(f) + m
            m = torch.maximum(f, i)
            kept, fresh = torch.exp(f - m), torch.exp(i - m)
            c, n = kept * c + fresh * torch.tanh(z), kept * n + fresh
            h = torch.sigmoid(o) * c / n
            rows.append(h)
        mixed = self.norm(torch.stack(rows, dim=1).reshape(batch * length, hidden))
        return self.out(mixed.view(batch, length, hidden))


def recurrent(hidden: int = 32) -> Decoder:
    """One mixer of each kind."""
    mixers = [WKV4(hidden), WKV6(hidden, 4, 8), SLSTM(hidden, 4), WKV7(hidden, 4, 8)]
    return Decoder(hidden, [*mixers, Gated(hidden, 64)])
