"""ExportedModel + samples → CalibrationTable: one streaming pass over the data, then ranges by any method.

``observe`` runs the FP32 model and counts; ``Statistics`` is what it counted; ``choose`` turns that into a table. The
pass is the expensive half: trying another method reads the same statistics again.
"""

from __future__ import annotations

from edgeres.calibrate.noise import expected_noise
from edgeres.calibrate.observe import observe
from edgeres.calibrate.ranges import METHODS
from edgeres.calibrate.statistics import Statistics, TensorStatistics
from edgeres.calibrate.table import AUTO, choose, described

__all__ = ["AUTO", "METHODS", "Statistics", "TensorStatistics", "choose", "described", "expected_noise", "observe"]
