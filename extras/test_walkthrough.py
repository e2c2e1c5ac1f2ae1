"""Tests of walkthrough.ipynb: it keeps to its limits, it runs, also cell by cell twice, its assertions and
its solutions hold, and it is saved with today's code. If that has changed, save it anew:

    python extras/test_walkthrough.py
"""
import ast
import builtins
import hashlib
import inspect
import operator
import os
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
NOTEBOOK = os.path.join(HERE, "walkthrough.ipynb")
sys.path.insert(0, ROOT)
import mokd   # noqa: E402

TITLE = r"(?m)^## (\d|To take home|Exercises|The box)(.*)$"
PSEUDOCODE = r"```python\n(.*?)```"
SOLUTION = r"<summary>Solution</summary>\n\n```python\n(.*?)```"

@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)

def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]

def text_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")

def sections_of(notebook):
    """-> the code of the first cell, the plumbing, and that of each section."""
    plumbing, *cells = code_of(notebook)
    sections = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            sections += [[] for _ in re.findall(TITLE, cell.source)]
        elif cell in cells:
            sections[-1].append(cell.source)
    return plumbing.source, ["\n".join(sources) for sources in sections]

def nodes(source, kind):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]

def execute(notebook, folder):
    """Run a notebook's cells in `folder`, from a fresh kernel. A cell that fails raises its error."""
    metadata = notebook.metadata.copy()
    NotebookClient(notebook, resources=dict(metadata=dict(path=folder)), timeout=1200, kernel_name="python3",
                   record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = metadata   # without this machine's version of Python
    return notebook

def test_it_keeps_to_its_limits(saved):
    text = text_of(saved)
    sources = [cell.source for cell in code_of(saved)] + re.findall(SOLUTION, text, re.S)
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    words = re.sub(r"(?s)```.*?```", "", text).split()
    assert os.path.getsize(NOTEBOOK) <= 800_000 and len(saved.cells) <= 48
    assert len(lines) <= 320 and len(words) <= 3000
    assert sum(int(minutes) for minutes in re.findall(r"(?m)^## .*\((\d+) minutes\)$", text)) == 60

def test_each_part_begins_with_lines_of_the_whole(saved):
    text = text_of(saved)
    blocks = re.findall(PSEUDOCODE, re.sub(SOLUTION, "", text, flags=re.S), re.S)
    lines = [[line.strip() for line in block.splitlines()] for block in blocks]
    whole = max(lines, key=len)
    opened = [line for block in lines for line in block if block is not whole and "#" in line]
    assert set(opened) == set(whole) and 12 <= len(whole) <= 15
    assert all("**Predict.**" in section for section in re.split(r"(?m)^## \d", text)[1:])
    assert len(re.findall(SOLUTION, text, re.S)) == text.count("<summary>Solution</summary>") == 6

def test_its_picture_is_that_of_the_method(saved):
    """It is a PNG in the first cell, because Jupyter serves no hidden folder, such as .github."""
    with open(os.path.join(ROOT, ".github", "method.svg"), "rb") as f:
        drawn_from = hashlib.sha1(f.read()).hexdigest()
    assert saved.cells[0].attachments["method.png"]["image/png"]
    assert saved.cells[0].metadata["drawn_from_sha1"] == drawn_from, "method.svg has changed: attach it anew"

def test_each_section_needs_the_plumbing_alone(saved):
    plumbing, sections = sections_of(saved)
    def loaded(source):
        return {node.id for node in nodes(source, ast.Name) if isinstance(node.ctx, ast.Load)}
    def made(source):
        names = {node.id for node in nodes(source, ast.Name) if isinstance(node.ctx, ast.Store)}
        names |= {node.arg for node in nodes(source, ast.arg)}
        names |= {node.name for node in nodes(source, ast.FunctionDef)}
        return names | {node.asname or node.name for node in nodes(source, ast.alias)}
    known = made(plumbing) | set(dir(builtins))
    for source in sections + re.findall(SOLUTION, text_of(saved), re.S):
        assert loaded(source) <= known | made(source)

def test_it_is_saved_with_outputs(saved):
    cells = code_of(saved)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}   # no error
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")   # no warning
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    with open(NOTEBOOK, encoding="utf-8") as f:
        assert not re.search(r"/(work|home|root|tmp|usr)/", f.read())

def test_it_shows_the_code_of_today(saved):
    for cell in code_of(saved):
        for name in re.findall(r"mokd\.([\w.]*\w)", "".join(re.findall(r"(?m)^show\((.*)\)", cell.source))):
            text = "".join(output.get("text", "") for output in cell.outputs)
            source = inspect.getsource(operator.attrgetter(name)(mokd))
            assert source in text, f"{name}: save the notebook anew"
    line, = re.findall(PSEUDOCODE, text_of(saved).split("$H$ is one line")[1], re.S)[:1]
    assert line.strip() in inspect.getsource(mokd.H)

def test_all_runs_each_cell_twice_and_so_do_the_solutions(saved):
    """In one pass, because trained pairs are kept: the second time costs next to nothing."""
    twice = []
    for cell in code_of(saved):
        twice += [cell.source, cell.source]
    twice += re.findall(SOLUTION, text_of(saved), re.S)
    cells = [nbformat.v4.new_code_cell(source) for source in twice]
    execute(nbformat.v4.new_notebook(cells=cells), ROOT)

if __name__ == "__main__":
    nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), HERE), NOTEBOOK)
