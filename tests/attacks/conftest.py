"""What the tests of attacks share."""

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """A list that grows by one with every program that JAX compiles, or reads from its cache on disk."""
    made: list[float] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED:
            made.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    jax.monitoring.unregister_event_duration_listener(listen)
