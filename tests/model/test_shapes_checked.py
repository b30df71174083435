"""Annotated shapes are checked wherever the tests call the model."""

import jax.numpy as jnp
import jaxtyping
import pytest

from gpt4moe.model.layers import activate
from gpt4moe.model.product import product
from gpt4moe.model.vocabulary import cross_entropy


def test_a_wrong_rank_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="targets_BT"):
        cross_entropy(jnp.ones((2, 3, 4)), jnp.ones((5, 4)), jnp.zeros(3, jnp.int32))


def test_one_letter_is_one_size():
    with pytest.raises(jaxtyping.TypeCheckError):
        activate(jnp.ones((2, 3)), jnp.ones((1, 3)))


def test_a_wrong_kind_of_number_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        product(jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2)))
