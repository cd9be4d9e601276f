"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_an_example_of_the_ops_one_of_lasco_and_one_of_4_bits():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["ops", "lasco", "4 bits"])
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    if "h_hat" in names:
        assert names["h_hat"].shape == names["h"].shape
    elif "model" in names:
        assert (tmp_path / "runs" / "adapter" / "adapter_config.json").exists()
        assert not any("lora" in name for name, _ in names["model"].named_parameters())
    else:
        assert names["y"].shape == (4, 256)
        assert names["image"].shape == names["h"].shape
