"""What the README and the docs show works as it is pasted, and what they point to is there."""

import re
from pathlib import Path

from engine import options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_snippet_runs_as_pasted(capsys):
    code = re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([8, 12, 64, 64])")


def test_every_linked_file_and_picture_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"


def test_every_file_that_is_named_in_a_command_is_there():
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"python (\w+\.py)", text):
            assert (ROOT / name).exists(), f"{page.name} runs {name}"
        for name in re.findall(r"python -m (benchmarks\.\w+)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), f"{page.name} runs {name}"


def test_the_commands_of_stage_one_have_options_that_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    lines = re.findall(r"^python train_stage1\.py (.*)", text, re.MULTILINE)
    assert lines
    for line in lines:
        options.stage1_options("", line.partition("  ")[0].split())
