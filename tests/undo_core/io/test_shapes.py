"""Values that a file holds have the shape that the code which reads them expects, down to the innermost."""

import pytest

from undo_core.io.untrusted import NUMBER, checked

SHAPE = {"rows": int, "of?": (NUMBER, type(None)), "splits": {str: {"names": [str]}}, "curve?": [(NUMBER, {"value": NUMBER})]}
VALUE = {
    "rows": 3,
    "of": 1.5,
    "splits": {"a": {"names": ["x"]}, "b": {"names": [], "more": 1}},
    "curve": [1, 2.5, {"value": 0}],
}


def test_a_value_of_this_shape_is_returned():
    for value in (VALUE, {**VALUE, "of": None}, {**VALUE, "rows": (1 << 64) - 1}, {"rows": 0, "splits": {}}):
        assert checked(value, SHAPE, "file") is value


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([], "file: got a list, wanted an object"),
        ({"rows": True}, "file: got true or false in 'rows', wanted an integer there"),
        ({"rows": 1.0}, "file: got a number in 'rows', wanted an integer there"),
        ({"of": "1"}, "file: got a text in 'of', wanted a number there"),
        ({"of": False}, "file: got true or false in 'of', wanted an integer there"),
        ({"splits": {"a": {"names": ["x", None]}}}, "file: got null in 'splits.a.names[1]', wanted a text there"),
        ({"splits": {"a": {}}}, "file: got no 'splits.a.names', wanted a list there"),
        ({"curve": [1, {"value": []}]}, "file: got a list in 'curve[1].value', wanted a number there"),
        ({"curve": 3}, "file: got an integer in 'curve', wanted a list there"),
        ({"of": float("nan")}, "file: got nan in 'of', wanted a finite number there"),
        ({"curve": [float("-inf")]}, "file: got -inf in 'curve[0]', wanted a finite number there"),
        ({"rows": 1 << 64}, "file: got an integer of more than 64 bits in 'rows', wanted fewer there"),
    ],
)
def test_another_one_is_refused_by_its_place(changed, said):
    with pytest.raises(ValueError) as error:
        checked({**VALUE, **changed} if isinstance(changed, dict) else changed, SHAPE, "file")
    assert str(error.value) == said
