"""Measures the machine at hand: `calibrate` returns what its `Hardware` says, with measured rates in place of assumed.

Nothing here predicts: it runs products, copies and reads, and times them.
"""

from __future__ import annotations

from simulate.calibration.figures import Figure
from simulate.calibration.machine import Calibration, calibrate

__all__ = ["Calibration", "Figure", "calibrate"]
