"""What speaks for a circuit and what against it.

explanations  `explain`: what a circuit does, in three sentences and ten nodes
reports       `report`: completeness, minimality, random circuits of equal size, redundancy, and a verdict on each
crosscheck    effects of single nodes by activation patching, exact and first order
agreement     how well a circuit agrees with scores of its nodes
hypotheses    the tests of Shi et al. 2024
comparison    circuits of several tasks side by side, beside chance
known         circuits of the literature
runs          many circuits on the same prompts
units         heads, blocks or nodes that are taken out one at a time
"""

from __future__ import annotations

from tl_nodeprune.circuit import Evaluation, Metrics, PromptMetrics, evaluate
from tl_nodeprune.evidence import crosscheck, hypotheses, known
from tl_nodeprune.evidence.agreement import Agreement, GranularityAgreement, NodeScore, agreement, auroc
from tl_nodeprune.evidence.comparison import Comparison, compare
from tl_nodeprune.evidence.crosscheck import COARSE, activation_patching, attribution_patching
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun
from tl_nodeprune.evidence.explanations.explain import explain
from tl_nodeprune.evidence.explanations.explanation import LOGITS, TERMS, Explanation
from tl_nodeprune.evidence.reports import Settings
from tl_nodeprune.evidence.reports.completeness import Completeness
from tl_nodeprune.evidence.reports.document import Report
from tl_nodeprune.evidence.reports.random_circuits import RandomDraws
from tl_nodeprune.evidence.reports.redundancy import Redundancy
from tl_nodeprune.evidence.reports.report import report
from tl_nodeprune.evidence.reports.verdicts import Findings, Verdict
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.evidence.units import Unit, closed, opened, units_of

__all__ = [
    "COARSE", "LOGITS", "TERMS", "Agreement", "CircuitRun", "CircuitRuns", "Comparison", "Completeness", "Evaluation", "Explanation",
    "Findings", "GranularityAgreement", "Metrics", "NodeScore", "PromptMetrics", "RandomDraws", "Redundancy", "Report", "Settings",
    "Unit", "Verdict", "activation_patching", "agreement", "attribution_patching", "auroc", "closed", "compare", "crosscheck",
    "evaluate", "explain", "hypotheses", "known", "opened", "report", "units_of",
]
