"""A comparison that passes has compared something: no missing name, no NaN, no other shape slips through."""

import pytest
import torch

from .compare import assert_tensors_close, relative_error

ONES = {"a": torch.ones(4), "b": torch.ones(2)}


def test_the_error_is_relative_to_the_expected_norm():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_a_norm_below_the_floor_counts_as_the_floor():
    assert relative_error(torch.tensor([1e-9]), torch.tensor([2e-9]), floor=1e-3) == pytest.approx(1e-6)


def test_something_for_nothing_is_infinitely_wrong():
    assert relative_error(torch.tensor([1e-30]), torch.zeros(1)) == float("inf")
    assert relative_error(torch.zeros(1), torch.zeros(1)) == 0.0


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        pytest.param({"a": ONES["a"]}, ONES, id="a missing name"),
        pytest.param({**ONES, "c": torch.ones(1)}, ONES, id="an unexpected name"),
        pytest.param({}, {}, id="nothing at all"),
        pytest.param({**ONES, "a": torch.ones(1)}, ONES, id="a shape that would broadcast"),
        pytest.param({**ONES, "b": torch.tensor([1.0, float("nan")])}, ONES, id="NaN"),
        pytest.param({**ONES, "b": torch.tensor([1.0, 1.1])}, ONES, id="a small tensor beside a large one"),
    ],
)
def test_a_wrong_result_does_not_pass(actual, expected):
    with pytest.raises(AssertionError):
        assert_tensors_close(actual, expected, 1e-2)
    assert_tensors_close(ONES, ONES, 0.0)
