"""What strategy="auto" chooses where the answer is known, and that it says so."""

import jax
import jax.numpy as jnp
import pytest

from ringbpt import hardware, rates
from ringbpt.attention import api, make_attention
from ringbpt.attention.choose import Choice, Load, can_deal, choose, estimate, machine
from ringbpt.mesh import make_mesh
from ringbpt.rates import Links
from ringbpt.types import TokenMeta

V4 = Links(hardware.find("v4"), 256)
V5P = Links(hardware.find("v5p"), 64)
H200 = Links(hardware.find("H200"), 8)


def load(sp: int, tokens: int, heads: int = 32, kv_heads: int = 8) -> Load:
    return Load(sp, 1, tokens, heads, kv_heads, head_dim=128, itemsize=2)


def test_a_ring_hides_what_is_long_enough():
    """2M tokens of the 7b preset over 64: the transfers vanish, so no strategy beats the ring's bare computation."""
    choice = choose(load(64, 32768, heads=8, kv_heads=8), V4)
    assert choice.strategy == "ring"
    assert choice.why.startswith(
        "32,768 tokens, 8 query and 8 kv heads a device, sp=64 on v4; a layer there and back: "
    )
    times = estimate(load(64, 32768, 8, 8), V4)
    share = rates.attention_share(V4.known, "auto", 128).best
    compute = 3.5 * 4 * 128 * 8 * 32768 * 64 * 32768 / 2 / (share * 275e12)
    assert times["ring", None].seconds == pytest.approx(compute, rel=1e-3)
    assert times["ring", None].exposed == 0 and not choice.bidirectional and "exposed" not in choice.why.split(",")[2]


def test_half_of_the_keys_go_each_way_where_one_way_is_exposed():
    """On a torus, whose links carry both ways at once; a GPU's are one pool whichever way it sends."""
    one = estimate(load(8, 32768, 32, 32), V5P)["ring", None]
    two = estimate(load(8, 4096, 32, 32), V5P)["ring", None]
    assert (one.ways, one.exposed) == (1, 0) and two.ways == 2
    odd = estimate(load(8, 4095, 32, 32), V5P)["ring", None]
    assert odd.ways == 1 and odd.exposed > two.exposed
    assert estimate(load(8, 256), H200)["ring", None].ways == 1


def test_short_shares_do_not_wait_for_a_ring():
    """As others measured: over NVLink, GQA 4:1, a ring wins from about 850 tokens a device on."""
    assert choose(load(8, 256), H200).strategy != "ring"
    assert choose(load(8, 32768), H200).strategy == "ring"


def test_heads_that_cannot_be_dealt_out_are_not():
    assert {name for name, _ in estimate(load(8, 256, heads=6, kv_heads=6), H200)} == {
        "ring",
        "all_gather",
        "ulysses_ring",
    }
    assert (can_deal(8, 2, 4), can_deal(8, 3, 4), can_deal(6, 6, 4)) == (True, False, False)


def test_gathered_keys_must_fit():
    assert ("all_gather", None) not in estimate(load(64, 65536), V4)
    assert ("all_gather", None) in estimate(load(8, 4096), V4)


def test_between_hosts_ulysses_stays_inside():
    """16 GPUs on two hosts, few tokens: heads are traded within a host, at most."""
    seconds = estimate(load(16, 1024, 32, 8), H200)
    assert min(u for strategy, u in seconds if strategy == "ulysses_ring") == 2
    assert seconds["ulysses_ring", 8].seconds < seconds["ulysses", None].seconds


def test_nothing_to_choose():
    assert choose(load(1, 256), V4).strategy == "none"
    assert choose(load(8, 256), None).strategy == "ring"
    assert machine(make_mesh((1, 1, 1, 8))) is None  # CPUs


def abstract(length: int) -> tuple[jax.ShapeDtypeStruct, TokenMeta]:
    """Queries, and where they stand."""
    place = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32), TokenMeta(place, place)


def test_auto_says_once_what_it_chose(caplog):
    api._log_once.cache_clear()
    caplog.set_level("INFO")
    attend = make_attention(make_mesh((1, 1, 1, 8)), strategy="auto")
    x, meta = abstract(64)
    for _ in range(2):
        assert jax.eval_shape(attend, x, x, x, meta).shape == x.shape
    assert [line for line in caplog.messages if "over sp" in line] == [
        "attention over sp: ring; nothing is known of this device's peak and links, and a ring needs least of both"
    ]


def test_each_shape_has_options_of_its_own(monkeypatch):
    """A ring's options go with the shapes that take a ring, and with no shape that comes after them."""
    ways = {64: "ring", 128: "all_gather", 256: "ring"}
    monkeypatch.setattr(api, "choose", lambda load, on: Choice(ways[load.tokens * load.sp], None, "as the test says"))
    attend = make_attention(make_mesh((1, 1, 1, 8)), strategy="auto", bidirectional=True, skip_hops=True)
    for length, strategy in ways.items():
        x, meta = abstract(length)
        program = str(jax.make_jaxpr(attend)(x, x, x, meta))
        assert ("ppermute" in program) == (strategy == "ring"), length
