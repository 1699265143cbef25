"""What runs by default: slow.toml names tests and cases that there are."""

import pytest
from conftest import CASES, QUICK


def test_every_test_and_case_of_slow_toml_is_there(pytestconfig):
    cases = pytestconfig.stash[CASES]
    files = {name.partition("::")[0] for name in cases}
    if len(files) < 90:
        pytest.skip("not all tests were collected")
    missing = []
    for name, quick in QUICK.items():
        if name.partition("::")[0] in files:  # a file that needs an absent package has no tests
            missing += [name] if name not in cases else [f"{name}[{case}]" for case in quick if case not in cases[name]]
    assert not missing
