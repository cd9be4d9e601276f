"""Figures: what tells curves apart."""

from __future__ import annotations

import pytest

from csimodels.evaluation import figures
from csimodels.evaluation.figures import line_figure


@pytest.mark.parametrize("steps", [False, True])
def test_more_curves_than_colours_still_look_different(tmp_path, monkeypatch, steps):
    kept = []
    save = figures._save
    monkeypatch.setattr(
        figures, "_save", lambda figure, *rest, **more: (kept.append(figure), save(figure, *rest, **more))
    )
    curves = {f"method {number}": ([0, 1], [number, number + 1]) for number in range(12)}
    line_figure(tmp_path / "x.png", {"y": curves}, "x", "title", steps=steps)
    lines = kept[0].axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(lines) == len(looks) == 12
    assert (tmp_path / "x.png").stat().st_size > 1000
