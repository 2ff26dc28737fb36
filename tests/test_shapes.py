"""The check of the alphabet sees what it should; it stands around the house's functions in all other tests."""

import jax.numpy as jnp
import pytest

from ringbpt.attention.core import row_delta
from ringbpt.model.feedforward import swiglu
from tests.shapes import checked, letters_of


def test_letters_are_read_off_the_names():
    names = ("q_BTNH", "cos_BTh", "x_BTNx", "head_dim", "token", "shape_BT", "w_gate_DF", "_BT", "size_s")
    assert [letters_of(name) for name in names] == ["BTNH", "BTh", "", "", "", "BT", "DF", "BT", ""]


def test_a_dim_too_many_or_of_another_size_is_an_error():
    @checked
    def attend(q_BTNH, k_BSKH, scale=1.0):
        return scale

    q = jnp.zeros((1, 2, 3, 4))
    assert attend(q, jnp.zeros((1, 5, 1, 4)), scale=2.0) == 2.0
    with pytest.raises(TypeError, match="k_BSKH has the shape"):
        attend(q, jnp.zeros((1, 5, 4)))
    with pytest.raises(TypeError, match=r"k_BSKH .* and H=4"):
        attend(q, jnp.zeros((1, 5, 1, 8)))


def test_the_house_is_checked():
    with pytest.raises(TypeError, match="row_delta: d_out_BTNH"):
        row_delta(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 3, 5)))
    with pytest.raises(TypeError, match="swiglu: w_down_FD"):
        swiglu(jnp.zeros((1, 2, 4)), jnp.zeros((4, 8)), jnp.zeros((4, 8)), jnp.zeros((4, 8)), jnp.matmul)
