"""scripts/compare_maxtext.py without MaxText: what it asks for, how a program is read, and the page that it writes."""

import json
import subprocess
from dataclasses import replace

import pytest

from ringbpt.config import UserError, parse, parse_args
from ringbpt.planning.program import Program
from scripts import compare_maxtext as compare
from tests.pictures import cut_off, drawn
from tests.planning.test_overlap import compiler

KNOWN = json.loads((compare.DOCS / "peers.json").read_text())


def test_the_page_says_what_is_known_and_what_is_not():
    page = compare.page(KNOWN)
    assert (compare.DOCS / "peers.md").read_text() == page
    for name in compare.ROWS:
        absent = [compare.SIDES[side] for side in compare.sides(name) if side not in KNOWN.get(name, {})]
        assert not absent or f"\n- {name}: {', '.join(absent)}\n" in page
    ring = KNOWN["v5p-16 32K ring"]
    assert f"| v5p-16 32K ring | ours | {ring['ours']['total'] / 2**30:.1f} |" in page
    assert f"|  | MaxText | {ring['theirs']['total'] / 2**30:.1f} |" in page
    without = compare.page({name: {"ours": row["ours"]} for name, row in KNOWN.items() if "ours" in row})
    assert "\n- v5p-16 32K ring: MaxText, MaxText's defaults\n" in without and "maxtext 0" not in without


def test_its_picture_is_whole(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    compare.draw(KNOWN, tmp_path / "peers.png")
    [(figure, _)] = figures
    assert cut_off(figure) == [] and "v5p-16 32K ring" in [text.get_text() for text in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize(("count", "strategy"), [(8, "ring"), (8, "all_gather"), (8, "ulysses"), (64, "ulysses_ring")])
def test_both_are_asked_for_the_same(count, strategy):
    machine = {8: "v5p-16", 64: "v6e-64"}[count]
    config = parse(parse_args(compare.our_flags(machine, count, 32768, strategy)), count)
    assert config.mesh_shape.sp == count and config.execution.sequence_parallel == strategy
    assert config.execution.remat_block == "nothing_saveable" and "remat_policy=full" in compare.THEIRS
    assert config.dtype == "bf16" and "dtype=bfloat16" in compare.THEIRS
    assert config.train_dataset.batch_size == 1 and config.train_dataset.seq_length == 32768
    sizes = config.architecture
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size) == (4096, 11008, 32000)  # llama2-7b there too


def test_heads_that_cannot_be_dealt_out_are_refused_in_a_line():
    with pytest.raises(UserError, match="ulysses") as refused:
        parse(parse_args(compare.our_flags("v6e-64", 64, 32768, "ulysses")), 64)
    assert "\n" not in compare.reason(refused.value)
    theirs = ValueError(
        "1 validation error for X\n  Value error, TPU Ulysses needs heads. [type=value_error, input={}]\n  x"
    )
    assert compare.reason(theirs) == "TPU Ulysses needs heads."


TEXT = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %send = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}, SENT
  %kernel.7 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="f/shard_map/kernel"}
  %sent = f32[8]{0} collective-permute-done(%send)
  %w = bf16[8]{0} convert(%x), metadata={op_name="f/dot_general"}
  %all = bf16[8]{0} all-reduce(%w), replica_groups={{0,1}}, to_apply=%add
  ROOT %r = f32[8]{0} add(%sent, %kernel.7), metadata={op_name="f/add"}
}
""".replace("SENT", 'metadata={op_name="f/shard_map/ppermute"}')


def test_a_program_is_read_by_what_sends_and_what_hides():
    program = Program({"state": 100}, 20, 120, 0, [], TEXT)
    found = compare.read("theirs", program, (1, 2), ("data", "context"))
    assert found == {
        "arguments": 100,
        "total": 120,
        "hops": 1,
        "hidden": 1,
        "attention": 32,
        "rest": 16,
        "exposed": {"attention": 0, "rest": 16},
        "sent": {
            "context collective-permute f32 of attention": 32,
            "context all-reduce bf16 of rest": 16,
        },
        "behind": {"kernel": 32},
    }
    assert compare.read("ours", replace(program, text=""), (1, 1, 1, 2), ()) == {"arguments": 100, "total": 120}
    assert "too much" in compare.cells({"arguments": 100, "total": 120})[0]
    assert compare.kinds(found) == "0.0 collective-permute f32 of attention, 0.0 all-reduce bf16 of rest"


@pytest.mark.parametrize("start", [{32: 200, 64: 240}, {32: 200, 1024: 1440}])
def test_the_longest_length_is_followed_to_the_limit(start):
    asked = []

    def total(tokens):
        asked.append(tokens)
        return 160 + tokens * 5 // 4

    found = compare.longest(total, start, limit=1000, unit=64)
    assert found == {"tokens": 640, "total": 960} and asked == [640]


def test_a_length_that_turns_out_too_long_is_shortened():
    grown = compare.longest(lambda tokens: tokens * tokens // 500, {256: 131, 512: 524}, limit=1000, unit=8)
    assert 0.95 * 1000 < grown["total"] <= 1000
    with pytest.raises(UserError, match="no length that fits"):
        compare.longest(lambda tokens: 2000, {256: 131, 512: 524}, limit=1000, unit=8)


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
    assert (tmp_path / "peers.md").read_text() == compare.page({name: known}) and (tmp_path / "peers.png").exists()


def test_without_maxtext_the_target_is_named(monkeypatch):
    def missing(package):
        raise compare.PackageNotFoundError(package)

    monkeypatch.setattr(compare, "version", missing)
    with pytest.raises(UserError, match="make peers"):
        compare.main(["--only=v5p-16 32K ring"])


@pytest.mark.slow
def test_our_side_is_compiled_and_read():
    """The whole model for eight TPUs: as the committed row has it, but for the compiler's version."""
    found = compare.read("ours", *compare.ours(compiler("v5p-16"), 32768, "ring"))
    assert found["hops"] == found["hidden"] > 0 and found["exposed"]["attention"] < 0.01 * found["attention"]
    assert abs(found["total"] / KNOWN["v5p-16 32K ring"]["ours"]["total"] - 1) < 0.05
    assert abs(found["attention"] / KNOWN["v5p-16 32K ring"]["ours"]["attention"] - 1) < 0.01
