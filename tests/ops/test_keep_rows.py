"""What is kept stands where the slot mapping says, and the value goes on unchanged."""

import torch

from autodeploy.ops.keep_rows import cached_keep_rows


def test_rows_are_written_to_their_slots_and_no_others() -> None:
    x, rows = torch.randn(1, 3, 4), torch.zeros(3, 2, 4)
    before = x.clone()
    result = cached_keep_rows(x, torch.tensor([5, 2, 3]), rows)
    torch.testing.assert_close(rows.view(6, 4)[[5, 2, 3]], before[0], rtol=0, atol=0)
    assert not rows.view(6, 4)[[0, 1, 4]].any()
    assert torch.equal(result, before) and torch.equal(x, before) and result.data_ptr() != x.data_ptr()
