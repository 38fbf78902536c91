"""What differential privacy costs: from events to epsilon, and back to the noise it takes."""

from cenacle.accounting.accountant import (
    Method,
    epsilon,
    noise_multiplier_for,
    spend,
    steps_within,
)

__all__ = ["Method", "epsilon", "noise_multiplier_for", "spend", "steps_within"]
