"""token_shift against indexing by hand."""

import torch

from autodeploy.ops import token_shift


def test_each_sequence_starts_from_the_first_rows() -> None:
    x = torch.arange(1.0, 8.0).reshape(1, 7, 1)
    borders = torch.tensor([0, 1, 3, 7], dtype=torch.int32)
    assert token_shift(x, 1, None, borders).flatten().tolist() == [0, 0, 2, 0, 4, 5, 6]
    assert token_shift(x, 2, torch.tensor([9.0]), borders).flatten().tolist() == [9, 9, 9, 9, 9, 4, 5]
    assert token_shift(x, 3, None, None).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4]
