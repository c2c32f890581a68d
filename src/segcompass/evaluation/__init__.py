"""Judge models on the benchmarks; ``judge`` takes any model, see docs/adapter.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcompass.evaluation.adapter import judge

__all__ = ["judge"]


def __getattr__(name: str) -> Any:
    if name == "judge":
        from segcompass.evaluation.adapter import judge

        return judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
