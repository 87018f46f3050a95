"""The method keeps to the contract; `python -m spqr_jax.methods check my_method` prints the same, line by line."""

import pytest

from spqr_jax import methods
from spqr_jax.methods import contract


@pytest.mark.parametrize("backbone", contract.KEYS)
def test_the_contract(backbone):
    findings = contract.check(methods.find("my_method"), [backbone])
    assert [contract.line(finding) for finding in findings if finding.fault] == []
