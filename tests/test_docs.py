"""What a reader is promised: links and file names that exist, settings that there are, a README that stays short."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from ladir.cli.commands import COMMANDS
from ladir.config import DataSettings
from ladir.config.loader import ConfigError, load_config, setting_names
from ladir.data.records import read_records

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "ds_configs" / "README.md", *(ROOT / "docs").glob("*.md")])
#: what was true on its day: files and settings named there may be gone
HISTORY = ("CHANGELOG.md", "log.md")
CURRENT = [page for page in PAGES if page.name not in HISTORY]
#: a reader's own files, in examples, and a file of the public release
EXAMPLES = {"configs/mine.yaml", "configs/NAME.yaml", "configs/my.yaml", "configs/cd_formal_8B_VAE_conn.yaml"}
#: shown as a mistake that is refused
MISTAKES = {"vae.latents_per_blok"}
FOLDERS = ("configs", "docs", "ds_configs", "ladir", "slurm", "tests", "training")
FIGURE = re.compile(r"\d[\d.,:]*")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """The page without code, tables, comments and pictures; of links the words."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    kept = [line for line in text.splitlines() if not line.startswith(("    ", "|", "#", "!["))]
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "`", "\n".join(kept)))


def sentences(text: str) -> list[str]:
    """Sentences of a page's prose; a paragraph or an item ends one, too."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\d+\. |- )", prose(text))
    return [
        part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])[\"*)]*\s+(?=[\"*(`A-Z])", " ".join(paragraph.split()))
    ]


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead, as GitHub names headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_files_that_are_named_exist(page: Path) -> None:
    pattern = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|md|yaml|json|sh|sbatch|png)\b"
    files = set(re.findall(pattern, page.read_text(encoding="utf-8"))) - EXAMPLES
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = set(setting_names())
    known |= {name.rpartition(".")[0] for name in known}
    sections = {name.partition(".")[0] for name in known if "." in name}
    pattern = rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+(?:\.[a-z_]+)*)(?=[=`,; )]|$)"
    found = set(re.findall(pattern, page.read_text(encoding="utf-8"), re.M)) - MISTAKES
    files = {name for name in found if name.endswith((".py", ".md", ".json", ".jsonl", ".yaml"))}
    assert [name for name in sorted(found - known - files) if not name.startswith("backbone.scratch.")] == []


def test_the_page_of_settings_is_fresh_and_knows_the_papers_values() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    fresh = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == script["page"]()
    assert fresh, "write it again: python docs/settings.py"
    assert script["PAPER"].keys() <= set(setting_names())


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours that stands on a line of its own in a page."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(?: {4}|)((?:python|deepspeed|torchrun) .*(?:training/\w+\.py|-m ladir) .*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def option_names(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def help_of(module: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        importlib.import_module(module).run(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_commands_of_the_program_that_are_shown_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their subcommand and options, by the help; what lm-evaluation-harness is given is its own."""
    for words in commands(page):
        if "-m" in words and words[words.index("-m") + 1] == "ladir":
            name, *rest = words[words.index("-m") + 2 :]
            name = name if name in COMMANDS else "ask" if " " in name else name
            assert name in COMMANDS, words
            if name != "harness":
                shown = help_of(COMMANDS[name].module, capsys)
                assert [option for option in option_names(rest) if option not in shown] == [], words


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_commands_of_the_entry_points_that_are_shown_would_start(page: Path, tmp_path: Path) -> None:
    """As far as their settings and options can tell: nothing is started."""
    block = re.search(r"```yaml\n(.*?)```", readme(), re.S)
    assert block is not None
    (tmp_path / "mine.yaml").write_text(block[1], encoding="utf-8")
    for words in commands(page):
        entry = next((word for word in words if re.fullmatch(r"training/\w+\.py", word)), None)
        if entry is None:
            continue
        rest = words[words.index(entry) + 1 :]
        source = (ROOT / entry).read_text(encoding="utf-8")
        unknown = [name for name in option_names(rest) if name != "--config" and f'"{name}"' not in source]
        assert unknown == [], words
        given = ROOT / rest[rest.index("--config") + 1] if rest[:-1].count("--config") else tmp_path / "mine.yaml"
        settings = [word for word in rest if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) and "$" not in word]
        if "ar.from_scratch=true" in settings:  # beside an LM that the page describes
            settings.append("backbone.scratch.model_type=llama")
        if "..." in " ".join(rest):  # the reader's to fill in
            assert {word.partition("=")[0] for word in settings} <= set(setting_names()), words
            continue
        load_config(str(given if given.is_file() else tmp_path / "mine.yaml"), settings)


def program_texts() -> str:
    """Every text in the program as it is written there, with what is filled in left open."""
    found = []
    for file in (*(ROOT / "ladir").rglob("*.py"), *(ROOT / "training").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_submission_that_is_shown_asks_for_cpus() -> None:
    """A job has one by default, which the scripts refuse for several processes."""
    shown = [*PAGES, *sorted((ROOT / "configs").glob("*.yaml"))]
    submissions = [line for file in shown for line in file.read_text(encoding="utf-8").splitlines() if "--gres=gpu" in line]
    assert len(submissions) > 4 and [line for line in submissions if "--cpus-per-task" not in line] == []


def test_errors_of_the_faq_are_those_that_the_program_prints() -> None:
    texts = program_texts()
    shown = re.findall(r"\*\*`([^`]+)`\*\*", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"))
    pieces = [piece.strip(" :;,.()'=@") for message in shown for piece in message.split("...")]
    assert len(shown) > 25
    assert [piece for piece in pieces if len(piece) > 8 and piece not in texts] == []


def test_entries_of_the_log_that_results_name_are_there() -> None:
    headings = "\n".join(re.findall(r"^## (.+)$", (ROOT / "docs" / "log.md").read_text(encoding="utf-8"), re.M))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [line for line in " ".join(text.split("\n\n")).splitlines() if "log.md" in line or re.match(r"\| [PCEXZ]\d? \|", line)]
    entries = [name for line in rows for name in re.findall(r'"([^"]{15,})"', line)]
    assert len(entries) > 10
    assert [name for name in entries if name not in headings] == []


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_comes_to_own_data_soon() -> None:
    lines = readme().splitlines()
    assert len(lines) <= 180
    assert lines.index("## Your own data") + 1 < 70


def test_the_demo_table_has_five_rows_and_few_words_beside_it() -> None:
    table = re.search(r"<!-- demo-table -->\n(.*)<!-- /demo-table -->", readme(), re.S)
    assert table is not None
    rows = re.findall(r"^\| `([a-z-]+)`", table[1], re.M)
    assert rows == ["ar", "ar-greedy", "ladir", "ladir-zero-noise", "ladir-rollout"]
    assert len(sentences(table[1])) == 1


def test_sentences_of_the_readme_have_two_figures_at_most() -> None:
    assert [part for part in sentences(readme()) if len(FIGURE.findall(part)) > 2] == []


def test_the_readme_is_free_of_words_that_only_the_project_knows() -> None:
    text = prose(readme()).lower()
    assert [word for word in ("lane", "track", "gold", "span", "zero noise") if re.search(rf"\b{word}s?\b", text)] == []


def test_the_readmes_settings_are_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", readme(), re.S)
    assert block is not None
    file = tmp_path / "mine.yaml"
    file.write_text(block[1], encoding="utf-8")
    assert load_config(str(file)).run.name == "mine"


def test_the_readmes_record_is_read_as_it_says(tmp_path: Path) -> None:
    file = tmp_path / "my_train.jsonl"
    file.write_text("".join(re.findall(r"^    (\{.*\}\n)", readme(), re.M)), encoding="utf-8")
    records = read_records(str(file), DataSettings())
    assert not records.bad
    assert [(record.blocks, record.answer) for record in records.records] == [
        (("3 * 12 = 36 eggs.", "36 - 5 = 31 are left."), "31"),
    ]


def test_the_readmes_errors_are_those_that_are_given() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["vae.latents_per_blok=3", "denoiser.objective=x1"])
    shown = re.findall(r"^ +- .*", readme(), re.M)
    assert len(shown) == 2
    assert [line for line in shown if line.strip() not in str(error.value)] == []


def test_a_sentence_with_many_figures_is_seen() -> None:
    assert [len(FIGURE.findall(part)) for part in sentences("One of 3. Two: 4.5 and 6,\n7 (see `8`).\n\n| 9 | 1 | 2 |")] == [1, 3]
