"""Tests of walkthrough.ipynb: it runs, its assertions hold, and it is saved with today's code. If that has
changed, save it anew:

    python extras/test_walkthrough.py
"""
import inspect
import operator
import os
import re
import sys

import nbformat
from nbclient import NotebookClient

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
NOTEBOOK = os.path.join(HERE, "walkthrough.ipynb")
sys.path.insert(0, ROOT)
import mokd   # noqa: E402

def execute(folder):
    """-> the notebook, executed in `folder`. A cell that fails raises its error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = dict(metadata=dict(path=folder))
    options = dict(timeout=1200, kernel_name="python3", record_timing=False)
    return NotebookClient(notebook, resources=resources, **options).execute()

def check_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}   # no error
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")   # no warning
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5

def test_it_runs_from_top_to_bottom_in_the_folder_above():
    check_outputs(execute(ROOT))

def test_it_is_short_and_saved_with_outputs():
    saved = nbformat.read(NOTEBOOK, as_version=4)
    check_outputs(saved)
    assert os.path.getsize(NOTEBOOK) <= 400_000 and len(saved.cells) <= 35
    assert all(len(cell.source.splitlines()) <= 20 for cell in saved.cells)
    sections = "\n".join(cell.source for cell in saved.cells).split("\n## ")[1:]
    assert len(sections) == 8 and all(re.search(r"\n *assert ", section) for section in sections)

def test_it_shows_the_code_of_today():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        calls = "".join(re.findall(r"(?m)(?:^show|getsource)\((mokd.*)\)", cell.source))
        for name in re.findall(r"mokd\.([\w.]+\w)", calls):
            text = re.sub(r"(?m)^.. \| ", "", "".join(output.get("text", "") for output in cell.outputs))
            source = inspect.getsource(operator.attrgetter(name)(mokd))
            assert source in text, f"{name}: save the notebook anew"

if __name__ == "__main__":
    nbformat.write(execute(HERE), NOTEBOOK)
