"""The tables of `experiments/README.md` are those that the results give."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import __main__ as command_line  # noqa: E402
from experiments.tools import report, tables  # noqa: E402


def test_every_table_stands_in_the_text_as_the_results_have_it():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.rendered(text) == text
    assert [name for name in tables.TABLES if f"<!-- {name} -->" not in text] == []


def test_every_result_says_how_to_get_it_and_is_written_as_results_are():
    paths = sorted(tables.RESULTS.rglob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        assert report.as_json(record) == text, path
        name = re.match(r"python -m experiments (\w+)", record["volatile"]["command"])
        assert name, path
        assert name[1] in command_line.FOLDERS
