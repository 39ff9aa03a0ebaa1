"""MIB's measures of a ranking (CPR, CMD) and its file format (arXiv:2504.13151).

format    the board's JSON files, read and written
measures  faithfulness at each size of a ranking, and the area that it makes
"""

from __future__ import annotations

from tl_nodeprune.circuit import SIZES
from tl_nodeprune.masks import distance, shortfall
from tl_nodeprune.mib.format import read, write
from tl_nodeprune.mib.measures import FaithfulnessCurve, area, evaluate

__all__ = ["SIZES", "FaithfulnessCurve", "area", "distance", "evaluate", "read", "shortfall", "write"]
