"""The part of the kernels' suite that `make test` runs asks all that the whole asks, one thing at a time."""

import pytest

from tests.attention.suite import CASES, COVERING, COVERING_WITH_SMALL, SMALL, Case, cases, features


def asked(of: list[Case]) -> set[str]:
    return {feature for case in of for feature in features(case)}


@pytest.mark.parametrize("small", [False, True])
def test_the_covering_set_covers(small):
    quick = [case for case in cases(small) if isinstance(case, Case)]
    assert asked(quick) >= asked(list(CASES)), asked(list(CASES)) - asked(quick)
    names = {case.name for case in CASES}
    assert {*COVERING, *COVERING_WITH_SMALL} <= names
    assert len(cases(small)) == len(CASES) + len(SMALL) * small
