"""Tapes: what two runs have in common is a program for any number of tokens; what they have not is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodeploy.capture.tape import Given, Made, Program, Recording, Unrepeatable, program


class _Body(nn.Module):
    """`[1, N, 4]` tokens; `cut` is called with the flat tokens and returns what the tests replace."""

    def __init__(self, body: Callable[[nn.Module, Tensor], object]):
        super().__init__()
        self.scale, self.body = nn.Parameter(torch.arange(4.0)), body
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def _loop(self: nn.Module, x: Tensor) -> object:
    flat = x.view(-1, 4)
    total = torch.zeros_like(flat)
    for row in range(len(flat)):  # as many steps as tokens
        value = flat[row] * (1 if bool(flat[row].sum() > 0) else 2)
        total.index_add_(0, torch.tensor([row]), value[None])
    aside = (flat * self.scale).add_(self.shift)
    return total.view(x.shape) + aside.view(1, -1, 4), aside.sum()


def _recorded(body: Callable[[nn.Module, Tensor], object], *lengths: int) -> tuple[nn.Module, list[Recording]]:
    module = _Body(body)
    recordings = [Recording(length) for length in lengths]
    for recording in recordings:
        recording.record(module, [torch.randn(1, recording.length, 4)])
    return module, recordings


def _last_of(recording: Recording, name: str) -> int:
    return max(i for i, step in enumerate(recording.steps) if name in str(step.function))


def _program(recordings: list[Recording], name: str) -> Program:
    cuts = tuple(_last_of(recording, name) for recording in recordings)
    return program(recordings[0], recordings[1], cuts, ((Given(0),), (Given(0),)))  # type: ignore[arg-type]


def test_a_loop_is_cut_out_and_the_rest_holds_for_any_length() -> None:
    module, recordings = _recorded(_loop, 3, 5)
    code = _program(recordings, "aten.index_add_")
    assert code.reads() == {"scale", "shift"} and not code.depends_on_values()
    x = torch.randn(1, 11, 4)
    with torch.no_grad():
        expected = module(x)
        result = code.run([x], lambda name: getattr(module, name), 11, lambda x: _doubled(x))
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(result, expected, strict=True))


def _doubled(x: Tensor) -> Tensor:
    return x * torch.where(x.sum(-1, keepdim=True) > 0, 1, 2)


def test_values_are_kept_as_each_step_left_them() -> None:
    def body(self: nn.Module, x: Tensor) -> object:
        y = x + 1
        y.mul_(2)
        return y

    _, (recording,) = _recorded(body, 3)
    added, doubled = (made[0] for made in recording.values)
    assert added is not None and doubled is not None and torch.equal(doubled, added * 2)
    assert recording.made_by(1, 0) == recording.made_by(0, 0) == Made(0, 0)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x.sigmoid() if x.shape[1] < 4 else x.tanh(),
        lambda self, x: x * 2.0 if x.shape[1] < 4 else x * 3.0,
        lambda self, x: x.sigmoid()[:, : x.shape[1] ** 2 // 4],
        lambda self, x: (x.sigmoid(), x.sigmoid()) if x.shape[1] < 4 else (x.sigmoid(),),
    ],
)
def test_runs_that_differ_in_more_than_proportional_sizes_are_refused(body) -> None:  # type: ignore[no-untyped-def]
    _, recordings = _recorded(lambda self, x: body(self, x.exp()), 3, 5)
    with pytest.raises(Unrepeatable):
        _program(recordings, "aten.exp")


def test_constants_of_the_code_must_be_the_same() -> None:
    _, recordings = _recorded(lambda self, x: x.exp() * torch.tensor([1.0, 2.0, 3.0, 4.0]), 3, 5)
    code, x = _program(recordings, "aten.exp"), torch.randn(1, 7, 4)
    result = code.run([x], lambda name: x, 7, torch.exp)
    assert torch.equal(result, x.exp() * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    _, recordings = _recorded(lambda self, x: x.exp() * torch.tensor([x.sum().item()]), 3, 5)
    with pytest.raises(Unrepeatable):
        _program(recordings, "aten.exp")


def test_steps_that_depend_on_values_are_told() -> None:
    _, recordings = _recorded(lambda self, x: x.exp().gather(1, (x > -9).nonzero()[None, :, :1] % 2), 3, 5)
    assert _program(recordings, "aten.exp").depends_on_values()
