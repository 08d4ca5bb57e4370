"""Statistics over the parts of a run."""

import numpy as np

from kd.reports.analysis.parts import mean_over_parts, std_over_parts


def test_parts_without_a_value_take_no_part() -> None:
    nan = np.nan
    values = np.array([[1.0, nan, nan], [3.0, 2.0, nan]])
    np.testing.assert_array_equal(mean_over_parts(values), [2.0, 2.0, nan])
    np.testing.assert_allclose(std_over_parts(values), [np.sqrt(2.0), nan, nan])
