"""`report`: what speaks for a circuit and what against it, each measure in a file of its own.

report           puts all of it together, with intervals
judged           the circuit beside the full and the ablated model and its complement: what every measure starts from
completeness     what the model still does without the circuit
minimality       what removing one unit does
random_circuits  circuits of equal size, sampled at random
redundancy       units that can do each other's work
verdicts         what was found, in words, and whether it speaks for the circuit
document         the report as text, frame and Markdown
"""

from __future__ import annotations

from tl_nodeprune.evidence.reports.completeness import Completeness
from tl_nodeprune.evidence.reports.document import Report
from tl_nodeprune.evidence.reports.random_circuits import RandomDraws
from tl_nodeprune.evidence.reports.redundancy import Redundancy
from tl_nodeprune.evidence.reports.report import report
from tl_nodeprune.evidence.reports.verdicts import Findings, Settings, Verdict

__all__ = ["Completeness", "Findings", "RandomDraws", "Redundancy", "Report", "Settings", "Verdict", "report"]
