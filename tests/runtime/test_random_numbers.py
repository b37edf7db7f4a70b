"""Numbers that depend on key and position alone, and are spread evenly over both."""

import numpy as np

from autodeploy.runtime.random_numbers import key_of, uniforms


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for the seed 1234567, as other implementations have them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    numbers = uniforms([1234567] * 4, range(4), 4)
    assert numbers.tolist() == [(output >> 11) / 2**53 for output in expected]


def test_keys_tell_numbers_and_their_order_apart() -> None:
    keys = {key_of(*numbers) for numbers in ((1,), (2,), (-1,), (1, 2), (2, 1), (0, 1), (1, 0), (2**64 + 5,), (2**63,))}
    assert len(keys) == 9 and all(0 <= key < 2**64 for key in keys)
    assert key_of(7, 8) == key_of(7, 8)


def test_numbers_are_even_over_positions_and_over_keys() -> None:
    count = 100_000
    for numbers in (
        uniforms([key_of(3)] * count, range(count), count),
        uniforms((key_of(seed) for seed in range(count)), [7] * count, count),
    ):
        assert numbers.min() >= 0 and numbers.max() < 1
        cells, _ = np.histogram(numbers, bins=100, range=(0, 1))
        assert ((cells - count / 100) ** 2 / (count / 100)).sum() < 170  # chi-square of 99 degrees, 1 - 1e-5
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
