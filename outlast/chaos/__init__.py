"""Chaos: runs a durable agent while what it depends on breaks, and says whether its promise held.

`trial.Trial` starts the agent in worker processes of its own, first undisturbed, then once for each fault. The workers
(`child`) write down every step they begin, end and record; the model is asked through a proxy (`proxy`) that counts;
`verdict` compares. `outlast chaos` is its face.
"""

from outlast.chaos.trial import SCENARIOS, Options, Trial
from outlast.chaos.verdict import Verdict

__all__ = ["SCENARIOS", "Options", "Trial", "Verdict"]
