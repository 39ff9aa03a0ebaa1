"""What speaks for a circuit and what against it.

report      `report`: everything below on one circuit
reporting   Report: verdicts, text, table, Markdown
findings    the numbers of a report
verdicts    each finding in words, and whether it speaks for the circuit
trial       the measurements that a report is made of
units       heads, blocks or nodes that are taken out one at a time, and random circuits of equal size
redundancy  units that can do each other's work
hypotheses  the tests of Shi et al. 2024
crosscheck  effects of single nodes by activation patching, exact and first order
agreement   how well a circuit agrees with scores of its nodes
"""

from __future__ import annotations

from tl_nodeprune.circuit import Evaluation, Metrics, evaluate
from tl_nodeprune.evidence import crosscheck, hypotheses
from tl_nodeprune.evidence.agreement import Agreement, GranularityAgreement, NodeScore, agreement, auroc
from tl_nodeprune.evidence.crosscheck import COARSE, activation_patching, attribution_patching
from tl_nodeprune.evidence.findings import Findings, Settings
from tl_nodeprune.evidence.redundancy import Redundancy
from tl_nodeprune.evidence.report import report
from tl_nodeprune.evidence.reporting import Report
from tl_nodeprune.evidence.trial import Completeness, RandomDraws
from tl_nodeprune.evidence.verdicts import Verdict

__all__ = [
    "COARSE", "Agreement", "Completeness", "Evaluation", "Findings", "GranularityAgreement", "Metrics", "NodeScore", "RandomDraws",
    "Redundancy", "Report", "Settings", "Verdict", "activation_patching", "agreement", "attribution_patching", "auroc", "crosscheck",
    "evaluate", "hypotheses", "report",
]
