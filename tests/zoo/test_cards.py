"""Cards agree with registry and evaluation, satisfy the hub, and are harmless to look at."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from phenoseq.cli import main
from phenoseq.errors import ModelError
from phenoseq.zoo import cards
from phenoseq.zoo.cards import complete, fill, printable, split_front
from phenoseq.zoo.describe import describe
from phenoseq.zoo.registry import Embedded, find, list_models

ROOT = Path(__file__).resolve().parents[2]
FROZEN = Path(__file__).with_name("frozen")
ENTRIES = {entry.name: entry for entry in list_models()}
each = pytest.mark.parametrize("name", ENTRIES)


@each
def test_a_card_is_what_make_cards_makes_of_it(name):
    page = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert fill(page) == page, "run 'make cards'"
    assert find(name).card == page


def test_the_readme_is_what_make_cards_makes_of_it():
    page = (ROOT / "README.md").read_text()
    assert fill(page) == page, "run 'make cards'"


def test_there_is_a_card_for_each_model_and_none_besides():
    assert sorted(p.stem for p in (ROOT / "model_cards").iterdir()) == sorted(ENTRIES)


@each
def test_the_metadata_of_a_card_are_the_registrys(name):
    entry, card = find(name), ModelCard(find(name).card)
    assert card.data.library_name == "phenoseq"
    assert card.data.license == entry.licence
    assert card.data.pipeline_tag in ("image-feature-extraction", "feature-extraction")
    assert "phenoseq" in card.data.tags
    assert len(card.data.datasets) == 1
    assert "/" not in card.data.datasets[0], "a data set of the hub, which there is none of"
    if not isinstance(entry.source, Embedded):
        assert card.data.eval_results is None, "it was not measured here"


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if isinstance(e.source, Embedded)])
def test_the_figures_of_a_card_are_those_of_the_evaluation(name):
    metrics = json.loads((find(name).folder / "metrics.json").read_text())
    measured = {k: v for k, v in metrics["scores"][0].items() if isinstance(v, float)}
    card = ModelCard(find(name).card)
    assert card.data.model_name == name
    told = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert told == pytest.approx(measured, rel=1e-5)
    assert describe(name).figures == told
    assert find(name).metrics == metrics
    (row,) = re.findall(rf"^\| {name} \|.*$", find(name).card, re.MULTILINE)
    assert f"| {measured['pcc_gene_median']:.3f} |" in row


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if isinstance(e.source, Embedded)])
def test_the_median_reliability_of_a_card_is_a_median(name):
    """Of an even number of genes, too: the simulated plate has 60."""
    config = json.loads((find(name).folder / "config.json").read_text())
    median = statistics.median(config["training"]["reliability"])
    assert f'(`var["reliability"]`): median {median:.2f};' in find(name).card


@each
def test_what_a_card_says(name):
    card = find(name).card
    assert f"# {name}\n" in card
    for heading in ("Use", "Data", "Training", "Scores", "Genes", "Known failures", "Versions"):
        assert f"\n## {heading}\n" in card
    assert "Not for" in card or "means nothing" in card
    assert find(name).data_licence in card or "simulate" in card
    assert not re.search(r"TODO|FIXME|\bXX+\b|lorem", card)


# ------------------------------------------------------------------------------------ made by code


def test_metadata_are_completed_and_what_is_there_stays():
    text = "---\nlicense: mit\nlibrary_name: torch\nbase_model: a/b\n---\n# Hi\n"
    front, body = split_front(complete(text, "m", {}))
    assert body == "# Hi\n"
    assert "license: mit\n" in front
    assert "base_model: a/b\n" in front
    assert "library_name: phenoseq\n" in front
    assert "model-index" not in front
    assert complete(f"---\n{front}---\n{body}", "m", {}) == f"---\n{front}---\n{body}"


def test_figures_that_were_not_measured_are_dropped():
    text = complete("# Hi\n", "m", {"scores": [{"name": "m", "mse": 0.5}], "data": "d"})
    assert "value: 0.5" in text
    assert "value" not in complete(text, "m", {})


@pytest.mark.parametrize("front", ["a: [", "- a\n- b", "a: !!python/object/apply:os.system [ls]"])
def test_metadata_that_are_none(front):
    with pytest.raises(ModelError, match="its metadata"):
        complete(f"---\n{front}\n---\n", "m", {})


def test_a_page_that_names_no_model():
    with pytest.raises(ModelError, match="nobody"):
        fill("<!-- table: nobody -->\n<!-- end -->")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": []}', '{"scores": [3]}', "[" * 99999])
def test_scores_that_are_none(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ModelError, match="not as 'phenoseq evaluate' writes it"):
        cards.read_metrics(tmp_path)


# ------------------------------------------------------------------------------------- looked at

EVIL = (
    "---\nlicense: \x1b[31mmit\n---\n# Title\x1b]0;owned\x07\n"
    "\x9b2Jgone \u202egnp.exe\r\x00 [bold]x[/]\n"
    "[safe](https://evil.example/x) <script>alert(1)</script> {{ 7 * 7 }} ![i](file:///etc/passwd)\n"
    "<!-- table: xenium-pancreas -->\n<!-- end -->\n"
)


def test_nothing_in_a_card_is_obeyed_by_a_terminal():
    shown = printable(EVIL)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert "Title�]0;owned�" in shown
    assert "� " not in printable("plain text\nof two lines\t.\n")
    assert printable("of Windows\r\n") == "of Windows\n"
    assert len(printable("x" * 5_000_000)) == 1 << 20


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("action", ["card", "show"])
def test_an_evil_card(tmp_path, capsys, monkeypatch, action, terminal):
    folder = tmp_path / "m"
    shutil.copytree(FROZEN / "v1-phenoseq", folder)
    (folder / "README.md").write_text(EVIL)
    if terminal:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
    assert main(["models", action, str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert all(c not in shown for c in "\x07\x9b\x00\r\u202e")
    assert "evil.example" in shown, "the address of a link is shown"
    assert "7 * 7" in shown
    assert "0.246" not in shown, "a stranger's card is not filled"


@each
def test_the_commands_show_a_card(name, capsys):
    assert main(["models", "show", name]) == 0
    shown = capsys.readouterr().out
    entry = find(name)
    for part in (entry.licence, entry.data, ", ".join(entry.channels), "Known failures"):
        assert part in shown
    assert main(["models", "card", name]) == 0
    assert capsys.readouterr().out == entry.card


def test_the_list(capsys):
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out == shown
    for entry in list_models():
        (row,) = [line for line in shown.splitlines() if line.strip().startswith(entry.name)]
        assert entry.pairing in row
        assert entry.licence in row


def test_a_folder_without_a_card(capsys):
    assert main(["models", "card", str(FROZEN / "v1-phenoseq")]) == 1
    assert "has no card" in capsys.readouterr().err
    assert main(["models", "show", str(FROZEN / "v1-published")]) == 0
    assert "scGPT embedding of 6 numbers" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["show", "card", "verify", "download"])
def test_no_such_model(action, capsys):
    assert main(["models", action, "xenium-pancraes"]) == 1
    assert "did you mean 'xenium-pancreas'?" in capsys.readouterr().err
