"""Is this sidecar and state store fit to hold runs (`examine`), and is what it holds whole (`repair`)?"""

from outlast.doctor.examination import Check, Examination, examine
from outlast.doctor.repairs import Finding, Repairs, repair

__all__ = ["Check", "Examination", "Finding", "Repairs", "examine", "repair"]
