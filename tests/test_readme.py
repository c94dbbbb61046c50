"""What the README and the docs show works as it is pasted, and what they point to is there."""

import re
import shlex
from pathlib import Path

import pytest

from engine import options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_snippet_runs_as_pasted(capsys):
    code = re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([8, 12, 64, 64])")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_a_page_links_or_runs_is_there(page):
    text = page.read_text()
    files = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files += [ROOT / name for name in re.findall(r"python (\w+\.py)", text)]
    files += [ROOT / f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (benchmarks\.\w+)", text)]
    assert [file for file in files if not file.exists()] == []


def test_the_commands_of_stage_one_have_options_that_exist():
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", "")
    lines = re.findall(r"^python train_stage1\.py (.*)", text, re.MULTILINE)
    assert lines
    for line in lines:
        options.stage1_options("", shlex.split(line, comments=True))
