"""The method keeps to the contract; `python -m spqr_jax.methods check my_method` prints the same, line by line."""

from spqr_jax import methods
from spqr_jax.methods import contract


def test_the_contract():
    findings = contract.check(methods.find("my_method"))
    assert [contract.line(finding) for finding in findings if finding.fault] == []
