"""Information-bottleneck defences for adversarial robustness, in JAX."""

from ibjax.run import Run, load

__all__ = ["Run", "load"]
