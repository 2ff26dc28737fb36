"""docs/peers.md without MaxText: the page that is written of what is known, and the script that goes on with it."""

import json
import subprocess

import pytest

from ringbpt.config import UserError
from ringbpt.planning import beside, peers_page
from scripts import compare_maxtext as compare
from tests.pictures import cut_off, drawn

KNOWN = json.loads((compare.DOCS / "peers.json").read_text())


def test_the_page_says_what_is_known_and_what_is_not():
    page = peers_page.page(KNOWN)
    assert (compare.DOCS / "peers.md").read_text() == page
    for name in beside.ROWS:
        absent = [beside.SIDES[side] for side in beside.sides(name) if side not in KNOWN.get(name, {})]
        assert not absent or f"\n- {name}: {', '.join(absent)}\n" in page
    ring = KNOWN["v5p-16 32K ring"]
    assert f"| v5p-16 32K ring | ours | {ring['ours']['total'] / 2**30:.1f} |" in page
    assert f"|  | MaxText | {ring['theirs']['total'] / 2**30:.1f} |" in page
    without = peers_page.page({name: {"ours": row["ours"]} for name, row in KNOWN.items() if "ours" in row})
    assert "\n- v5p-16 32K ring: MaxText, MaxText's defaults\n" in without and "maxtext 0" not in without


def test_a_cell_says_what_was_too_much_and_what_was_sent():
    assert "too much" in peers_page.cells({"arguments": 100, "total": 120})[0]
    sent = {"context collective-permute f32 of attention": 32, "context all-reduce bf16 of rest": 16}
    assert peers_page.kinds({"sent": sent}) == "0.0 collective-permute f32 of attention, 0.0 all-reduce bf16 of rest"


def test_its_picture_is_whole(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    peers_page.draw(KNOWN, tmp_path / "peers.png")
    [(figure, _)] = figures
    assert cut_off(figure) == [] and "v5p-16 32K ring" in [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Each side is written as soon as it is known; one that takes too long, or says nothing, is left for later."""
    name, other = "v5p-16 32K all_gather", "v5p-16 32K ulysses"
    known = dict.fromkeys(("ours", "theirs"), KNOWN["v5p-16 32K ring"]["ours"])
    (tmp_path / "peers.json").write_text(json.dumps({name: {"ours": known["ours"]}}))
    asked = []

    def run(command, **how):
        asked.append(command[2:])
        before = json.loads((tmp_path / "peers.json").read_text())
        if other in command[3] and "ours" in command[2]:
            assert before == {name: known}  # what came before is on the disk
            raise subprocess.TimeoutExpired(command, how["timeout"])
        said = json.dumps(known["theirs"]) if other not in command[3] else ""
        return subprocess.CompletedProcess(command, 0 if said else -6, said)

    monkeypatch.setattr(compare, "DOCS", tmp_path)
    monkeypatch.setattr(compare, "version", lambda package: "0")
    monkeypatch.setattr(subprocess, "run", run)
    for only in (name, other, name):
        assert compare.main([f"--only={only}", "--minutes=1"]) == 0
    assert asked == [
        ["--side=theirs", f"--only={name}"],
        ["--side=ours", f"--only={other}"],
        ["--side=theirs", f"--only={other}"],
    ]
    assert json.loads((tmp_path / "peers.json").read_text()) == {name: known}
    assert (tmp_path / "peers.md").read_text() == peers_page.page({name: known}) and (tmp_path / "peers.png").exists()


def test_without_maxtext_the_target_is_named(monkeypatch):
    def missing(package):
        raise compare.PackageNotFoundError(package)

    monkeypatch.setattr(compare, "version", missing)
    with pytest.raises(UserError, match="make peers"):
        compare.main(["--only=v5p-16 32K ring"])
