"""What holds for the repository as a whole: nothing of one machine, hashed dependencies, true documents."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import proxy_usage

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {
    name: ROOT / "requirements" / f"{name}.txt" for name in ("build", "run", "demo", "dev", "ceilometer")
}

# Written so that no pattern matches its own source.
INDEX_ADDRESS = re.compile(
    r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|(?:deb|ftp)\.[\w.]*debian\.org|proxy\.golang\.org"
    r"|--(?:extra-)?index-url|--find-link[s]|https?://[^\s\"'<>]+/simple\b",
    re.IGNORECASE,
)
MACHINE_PATH = re.compile(r"(?<![\w.:/}$~-])/(?:home|Users|root|work|tmp|mnt|private)/[\w.]")
REQUIREMENT = re.compile(
    r"^([A-Za-z0-9][\w.-]*)==([\w.+!]+)(?: ; [^\\]+?)?((?: --hash=sha256:[0-9a-f]{64})*)$"
)


def repository_files() -> list[Path]:
    """The tracked files and those that would be added next: what a commit from here can contain."""
    listed = subprocess.run(
        [
            "git",
            "-c",
            f"safe.directory={ROOT}",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def found(pattern: re.Pattern[str], paths: Iterable[Path]) -> list[str]:
    """Each match as `file:line: text`."""
    matches = []
    for path in paths:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if match := pattern.search(line):
                matches.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    return matches


def requirements(path: Path) -> dict[str, tuple[str, int]]:
    """Name → (version, number of hashes) of every requirement in the lock file.

    Raises `AssertionError` for a line that is anything else: an option, an address, a range.
    """
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    pinned = {}
    for line in re.sub(r" \\\n +", " ", "\n".join(lines)).splitlines():
        match = REQUIREMENT.match(line)
        assert match, f"{path.name}: not an exactly pinned requirement: {line}"
        pinned[match[1]] = (match[2], match[3].count("--hash="))
    return pinned


def project() -> dict[str, Any]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return document


def test_files_name_no_package_index() -> None:
    assert found(INDEX_ADDRESS, repository_files()) == []


def test_files_name_no_path_of_one_machine() -> None:
    assert found(MACHINE_PATH, repository_files()) == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (INDEX_ADDRESS, "https://" + "pypi" + ".org/simple"),
        (INDEX_ADDRESS, "pip install --extra-" + "index-url X"),
        (INDEX_ADDRESS, "http://mirror.example.com/repo/" + "simple/"),
        (MACHINE_PATH, "cd /" + "home/jo/proxy-usage"),
        (MACHINE_PATH, "path: '/" + "tmp/usage.db'"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_requirement_is_hashed(name: str) -> None:
    pinned = requirements(LOCKS[name])
    assert pinned
    assert [requirement for requirement, (_, hashes) in pinned.items() if not hashes] == []


@pytest.mark.parametrize(("smaller", "larger"), [("run", "demo"), ("demo", "dev"), ("build", "demo")])
def test_the_locks_agree(smaller: str, larger: str) -> None:
    assert requirements(LOCKS[smaller]).items() <= requirements(LOCKS[larger]).items()


@pytest.mark.parametrize("name", ["run", "demo", "dev"])
def test_the_locks_hold_what_pyproject_asks_for(name: str) -> None:
    metadata = project()["project"]
    asked = metadata["dependencies"] if name == "run" else metadata["optional-dependencies"][name]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in asked} - {metadata["name"]}
    assert names <= requirements(LOCKS[name]).keys()


@pytest.mark.parametrize(
    "line", ["aiohttp>=3", "aiohttp", "-r other.txt", "aiohttp @ git+ssh://example.com/a"]
)
def test_a_requirement_that_is_not_pinned_is_found(line: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"{line}\n")
    with pytest.raises(AssertionError, match="not an exactly pinned requirement"):
        requirements(lock)


def test_one_version() -> None:
    declared = project()["project"]["version"]
    assert proxy_usage.__version__ == version("proxy-usage") == declared
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == declared


def test_the_changelog_has_a_place_for_the_next_change() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:])


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["project"]["license"] == "Apache-2.0"


def make_verbs() -> set[str]:
    """The targets that a person may type: those `make help` describes."""
    return set(re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_in(markdown: str) -> str:
    """What stands in code blocks and between backticks, so that prose may say "make sure"."""
    blocks = re.findall(r"^ *```.*?^ *```", markdown, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", markdown)
    return "\n".join([*blocks, *spans])


def test_make_help_lists_every_verb() -> None:
    make = shutil.which("make")
    assert make, "the tests are started by make"
    helped = subprocess.run(
        [make, "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert (
        {line.split()[1] for line in helped.stdout.splitlines()}
        == make_verbs()
        >= {"setup", "run", "check", "test"}
    )


def test_make_soak_takes_as_long_as_it_is_told() -> None:
    make = shutil.which("make")
    assert make, "the tests are started by make"
    command = [make, "--no-print-directory", "--just-print", "soak"]
    told, by_default = (
        subprocess.run([*command, *more], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for more in (["MINUTES=13"], [])
    )
    assert "bench/soak.py 13" in told
    minutes = re.findall(r"float\(sys.argv\[1\]\) .* else (\d+)", (ROOT / "bench" / "soak.py").read_text())
    assert "bench/soak.py" in by_default
    assert f"then {minutes[0]} minutes (MINUTES=n)" in (ROOT / "Makefile").read_text()


def test_documents_name_verbs_that_exist() -> None:
    named = {
        verb
        for path in repository_files()
        if path.suffix == ".md"
        for verb in re.findall(r"\bmake ([a-z][a-z-]*)", code_in(path.read_text()))
    }
    assert named <= make_verbs()
    readme = code_in((ROOT / "README.md").read_text())
    assert {"run", "test"} <= set(re.findall(r"\bmake ([a-z][a-z-]*)", readme))


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in repository_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []


SKIPS = """
import pytest

@pytest.mark.skip(reason="{reason}")
def test_one() -> None:
    raise AssertionError
"""


SKIPS_INSIDE = """
import pytest

def test_one() -> None:
    pytest.skip("no promtool here")
"""


@pytest.mark.parametrize(
    ("body", "arguments", "outcome"),
    [
        (SKIPS.format(reason="no promtool here"), [], "1 skipped"),
        (SKIPS.format(reason="no promtool here"), ["--require-tools"], "1 error"),
        (SKIPS_INSIDE, ["--require-tools"], "1 failed"),
        (
            SKIPS.format(reason="kubectl older than 1.21: v1.20.5"),
            ["--require-tools"],
            "1 skipped",
        ),
        ("import pytest\npytest.importorskip('no_such_module_anywhere')\n", ["--require-tools"], "1 error"),
    ],
)
@pytest.mark.parametrize("distributed", [False, True], ids=["here", "in a worker"])
def test_a_skip_fails_where_every_tool_is_required(
    body: str, arguments: list[str], outcome: str, distributed: bool, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_skips.py").write_text(body)
    quiet = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function"]
    where = ["-n", "1"] if distributed else ["-p", "no:xdist"]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--rootdir",
            str(tmp_path),
            *quiet,
            *where,
            *arguments,
            str(tmp_path),
        ],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        env={},
    )
    assert outcome in ran.stdout, ran.stdout + ran.stderr
    assert (ran.returncode == 0) == ("skipped" in outcome)
