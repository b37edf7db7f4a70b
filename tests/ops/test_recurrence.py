"""The recurrence given as text, against a plain Python loop; starting values, dtypes and text round trip."""

import itertools

import torch

from autodeploy.ops.recurrence import Body, cached_recurrence, parse_body, recurrence

DECAYING_SUM = Body(
    calls=(("aten.mul.Tensor", [["h", 0], ["c", 0]], {}), ("aten.add.Tensor", [["n", 0], ["x", 0]], {"alpha": 2})),
    carries=(["n", 1],),
    outputs=(["n", 1],),
)


def test_is_the_loop_it_stands_for() -> None:
    x, decay, start = torch.randn(1, 9, 4), torch.rand(4), torch.randn(4)
    borders = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    result = recurrence([x], [decay], [start], DECAYING_SUM.text(), borders)
    expected = []
    for begin, end in ((0, 2), (2, 9)):
        state = start
        for row in x[0, begin:end]:
            state = state * decay + 2 * row
            expected.append(state)
    torch.testing.assert_close(result[0], torch.stack(expected))


def test_text_is_the_body_and_holds_dtypes_lists_and_devices() -> None:
    body = Body(
        calls=(
            ("aten.to.dtype", [["x", 0], {"torch": "float64"}], {}),
            ("aten.cat.default", [{"list": [["n", 0], ["h", 0]]}, 0], {}),
            ("aten.sum.default", [["n", 1]], {}),
            ("aten.zeros.default", [{"list": [2]}], {"device": {"device": "tokens"}}),
            ("aten.to.dtype", [["n", 2], {"torch": "float32"}], {}),
            ("aten.add.Tensor", [["n", 3], ["n", 4]], {}),
        ),
        carries=(["x", 0],),
        outputs=(["n", 5],),
    )
    assert parse_body(body.text()).text() == body.text()
    x = torch.arange(6.0).reshape(1, 3, 2)
    result = recurrence([x], [], [torch.zeros(2)], body.text(), None)
    assert result[0].tolist() == [[1, 1], [6, 6], [14, 14]]


def test_a_new_sequence_ignores_what_its_slot_holds() -> None:
    x, decay = torch.randn(1, 3, 4), torch.rand(4)
    carried = torch.full((2, 4), float("nan"))
    result = cached_recurrence(
        [x], [decay], [torch.ones(4)], DECAYING_SUM.text(), None, torch.tensor([3]), torch.tensor([1]), carried
    )
    expected = recurrence([x], [decay], [torch.ones(4)], DECAYING_SUM.text(), None)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert torch.equal(carried[1], result[0, -1]) and carried[0].isnan().all()


def test_the_sampled_scalar_memory_is_the_cell_of_its_paper() -> None:
    """sLSTM (arXiv 2405.04517) without its logarithms, whose gates are small enough here."""
    sample = recurrence.samples()[1]
    (gates,), (weights,), borders = sample["tokens"], sample["constants"], sample["cu_seqlens"].tolist()
    rows = []
    for start, end in itertools.pairwise(borders):
        h = c = n = torch.zeros(8)
        for t in range(start, end):
            update, enter, forget, leave = gates[0, t] + torch.einsum("d,dge->ge", h, weights)
            c = torch.sigmoid(forget) * c + enter.exp() * update.tanh()
            n = torch.sigmoid(forget) * n + enter.exp()
            h = torch.sigmoid(leave) * c / n
            rows.append(h)
    torch.testing.assert_close(recurrence(**sample)[0], torch.stack(rows), rtol=1e-4, atol=1e-5)
