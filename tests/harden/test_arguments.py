"""Anything for an argument of the public ops: the call works, or refuses it by name before it changes anything."""

import warnings

from hostile_arguments import attempt


def test_any_argument_is_taken_or_refused_by_name(tries, account):
    count = tries(400, 50_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, for prototypes such as nested tensors
        refused = sum(attempt(seed) for seed in range(count))
    assert 0.3 * count < refused < count, "most calls have something wrong, and some work"
    account("any argument of an op", tried=count, survived=count - refused, refused=refused)
