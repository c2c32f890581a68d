"""Predictions in other tools' forms."""

from __future__ import annotations

import numpy as np
import pytest
from factories import INTERFACES, make_prediction, malformed


@pytest.mark.parametrize("interface", INTERFACES)
def test_plots_have_a_panel_for_all_there_is(interface: str) -> None:
    pytest.importorskip("matplotlib")
    prediction = make_prediction(interface=interface)
    titles = [axis.get_title() for axis in prediction.plot().axes]
    heatmaps = [] if prediction.slot_heatmaps is None else ["heatmap 0.94", "heatmap 0.81"]
    assert titles == ["", "masks", *heatmaps]
    assert len(malformed(interface=interface).plot().axes) == 2


@pytest.mark.parametrize("interface", INTERFACES)
def test_detections_are_the_masks_that_count(interface: str) -> None:
    pytest.importorskip("supervision")
    prediction = make_prediction(interface=interface)
    found = prediction.to_supervision()
    np.testing.assert_array_equal(found.mask, prediction.masks)
    assert found.class_id.tolist() == [0, 2]
    assert len(malformed(interface=interface).to_supervision()) == 0
