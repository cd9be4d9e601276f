"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_an_example_of_the_ops_and_one_of_lasco():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["ops", "lasco"])
def test_example_runs(example):
    names = {}
    exec(compile(example, str(README), "exec"), names)
    if "h_hat" in names:
        assert names["h_hat"].shape == names["h"].shape
    else:
        assert names["y"].shape == (4, 256)
        assert names["image"].shape == names["h"].shape
