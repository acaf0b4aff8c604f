"""The README and docs/ say what is true: their code runs; links, names, switches and outputs are those of the code."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxfuse import pattern as patterns
from fxfuse.bench import tables
from fxfuse.bench.limits import PRECISION_DTYPE
from fxfuse.bench.workloads import WORKLOADS
from fxfuse.kernels import build

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = (README, *sorted(DOCS.rglob("*.md")))
PATTERNS = sorted(p.stem for p in (ROOT / "fxfuse" / "patterns").glob("*.py") if not p.stem.startswith("_"))

BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
#: every way the sources read an environment variable
ENVIRONMENT = re.compile(r"""(?:environ\.get\(|environ\[|getenv\()\s*["'](\w+)["']""")
#: what a page of a pattern has to answer, as headings
QUESTIONS = (
    "Why", "The algebra", "What is fused, and what that saves", "What is recognised",
    "How the kernel is built and called", "What is left alone, and known differences", "The ladder", "Measured",
)  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(text: str, language: str) -> str:
    """The blocks of one language as one source, each at the line it has on the page."""
    lines: list[str] = []
    for block in BLOCK.finditer(text):
        if block["language"] == language:
            first = text.count("\n", 0, block.start("code"))
            lines += [""] * (first - len(lines)) + block["code"].splitlines()
    return "\n".join(lines)


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """The headings as links name them."""
    found = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


# --- code ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Iterator[None]:
    """Patterns that a page registers go again."""
    before = dict(patterns._registered)
    yield
    patterns._registered.clear()
    patterns._registered.update(before)


def run(page: Path) -> str:
    """Run a page's Python in one namespace; returns what it prints."""
    source = code_of(read(page), "python")
    if "fxfuse.vocabulary" in source:  # words can't be taken back: a process of its own
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
        assert done.returncode == 0, f"{name(page)}:\n{done.stderr}"
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name(page), "exec"), {"__name__": page.stem.replace("-", "_")})
    return printed.getvalue()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", [p for p in PAGES if code_of(read(p), "python")], ids=name)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes does not stay
    run(page)


def test_code_of_keeps_lines() -> None:
    assert code_of("a\n```python\nx\n```\n\n```sh\nls\n```\n```python\ny\n```\n", "python") == "\n\nx\n\n\n\n\n\n\ny"


def test_the_report_in_the_readme_is_what_the_quickstart_prints() -> None:
    shown = re.search(r"<!-- report -->\n```text\n(.*?)```\n<!-- /report -->", read(README), re.DOTALL)
    assert shown, "README.md has no block between <!-- report --> and <!-- /report -->"
    assert run(README).strip() == shown[1].strip()


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc: the kernel on the page is not compiled")
def test_the_kernel_on_a_page_compiles(tmp_path: Path) -> None:
    source = tmp_path / "axpy.cu"
    source.write_text(code_of(read(DOCS / "add-a-kernel.md"), "cpp"), encoding="utf-8")
    nvcc = build.find_nvcc()
    assert nvcc
    command = [nvcc, "-std=c++17", "-arch=sm_80", f"-I{build.KERNELS}", "-c", "-o", "axpy.o", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


# --- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(prose(read(page))):
        path, _, anchor = link["target"].partition("#")
        if re.match(r"\w+:", path):
            assert path.startswith("https://"), f"{name(page)}: {link['target']}"
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link['target']}, which is not there"
        assert not anchor or anchor in anchors(read(target)), f"{name(page)}: {link['target']} names no heading"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", read(ROOT / "mkdocs.yml")))
    assert listed == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_has_a_page_that_answers(pattern: str) -> None:
    page = read(DOCS / "patterns" / f"{pattern}.md")
    assert page.startswith(f"# {pattern}\n")
    assert re.findall(r"^## (.+)$", prose(page), re.MULTILINE) == list(QUESTIONS)
    for machine in ("h200", "cpu"):
        own = rf"<!-- bench:{machine}[\w-]* workload={pattern}\w* view=full -->"
        assert re.search(own, page), f"no {machine} numbers"
    assert f"`{pattern}`" in read(README)


def test_no_page_is_of_a_pattern_that_is_gone() -> None:
    assert sorted(p.stem for p in (DOCS / "patterns").glob("*.md")) == PATTERNS


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- bench:" in read(p)], ids=name)
def test_places_for_numbers_are_well_formed(page: Path) -> None:
    text = read(page)
    places = list(tables.MARKER.finditer(text))
    assert len(places) == text.count("<!-- bench:") == text.count("<!-- /bench:")
    for place in places:
        options = dict(option.split("=", 1) for option in place["options"].split())
        if "table" in options:
            assert options.keys() == {"table"}
            continue
        assert options.pop("view", "summary") in {*tables.VIEWS, "compiler"}
        assert WORKLOADS.keys() >= set(options.pop("workload", "kl_div").split(","))
        assert PRECISION_DTYPE.keys() >= {options.pop("precision", "fp32")}
        assert not options


# --- switches ------------------------------------------------------------------------------------------------------


def variables_read() -> set[str]:
    sources = [ROOT / "setup.py", *(p for kind in ("py", "cu", "cuh") for p in (ROOT / "fxfuse").rglob(f"*.{kind}"))]
    return {variable for source in sources for variable in ENVIRONMENT.findall(read(source))}


def test_reading_the_environment_is_seen() -> None:
    seen = variables_read()
    assert {"FXFUSE_LIMIT", "FXFUSE_PORTABLE", "FXFUSE_PREBUILT", "CUDACXX"} <= seen
    everywhere = {v for p in (ROOT / "fxfuse").rglob("*.py") for v in re.findall(r"[\"'](FXFUSE_\w+)[\"']", read(p))}
    assert everywhere <= seen, "a switch is read in a way this test does not see"


@pytest.mark.parametrize("page", [README, DOCS / "switches.md"], ids=name)
def test_every_switch_stands_in_the_table(page: Path) -> None:
    rows = re.findall(r"^\| (`.+?) \|", read(page), re.MULTILINE)
    documented = {switch for row in rows for switch in re.findall(r"`([A-Z0-9_]+)`", row)}
    ours = {variable for variable in variables_read() if variable.startswith("FXFUSE_")}
    assert {switch for switch in documented if switch.startswith("FXFUSE_")} == ours
    assert {"CUDACXX", "CUDA_HOME", "CUDA_PATH"} <= documented


# --- architecture --------------------------------------------------------------------------------------------------


def test_files_named_in_the_architecture_are_there() -> None:
    text = read(DOCS / "architecture.md")
    for file in re.findall(r"`([\w/]+\.(?:py|cuh?)|[a-z]+/)`", text):
        assert (ROOT / "fxfuse" / file).exists(), f"architecture.md names {file}"


def test_every_module_has_its_place_in_the_architecture() -> None:
    text = read(DOCS / "architecture.md")
    package = ROOT / "fxfuse"
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    missing = sorted(m for m in modules | folders if f"`{m}`" not in text)
    assert not missing, f"architecture.md does not say what these are for: {', '.join(missing)}"


def test_pages_of_one_pattern_name_files_that_are_there() -> None:
    for page in (DOCS / "patterns").glob("*.md"):
        for file in re.findall(r"`((?:kernels|benchmarks)/[\w/]+\.\w+)`", read(page)):
            home = ROOT if file.startswith("benchmarks") else ROOT / "fxfuse"
            assert (home / file).exists(), f"{name(page)} names {file}"
        for file in re.findall(r"`(\w+\.cuh)`", read(page)):
            assert (ROOT / "fxfuse" / "kernels" / file).exists(), f"{name(page)} names {file}"


def test_the_picture_needs_nothing_from_outside() -> None:
    picture = read(DOCS / "architecture.svg")
    assert picture.startswith("<svg") and 'fill="#ffffff"' in picture, "an opaque background reads on any page"
    assert not re.search(r"(?:href|src)=\"http", picture)
