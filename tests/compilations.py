"""Which programs a test compiles."""

import contextlib
from collections.abc import Iterator

from jax import monitoring


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled meanwhile, in their order."""
    names: list[str] = []

    def listen(event: str, _: float, **details: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", ""))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(listen)
