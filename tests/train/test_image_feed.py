"""Images on the devices: the shapes and layout that the step is compiled for, and what is drawn into them."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.data.pipeline import TrainRows, open_store
from gpt4moe.train import feed
from tests.data.image_documents import config_of, many


@pytest.mark.parametrize("frames", [1, 2])
def test_images_follow_their_rows_and_are_whole_along_other_axes(tmp_path, frames):
    images = types.SimpleNamespace(height=4, width=6, per_row=2, frames=frames)
    config = config_of(many(40), images=type(config_of([]).images)(**vars(images), workers=1))
    train = types.SimpleNamespace(ramp=((0, 16 * 4 * 3),), replay_routing=None)
    run = types.SimpleNamespace(train=train, microbatch_rows=4, data=config)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "context"))
    abstract = feed.abstract_microbatches(run, NamedSharding(mesh, PartitionSpec("data", "context")))
    store = open_store(config, tmp_path)
    drawn = feed.draw(TrainRows(store, config, microbatch_rows=4), 16 * 4 * 2, abstract)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), drawn.microbatches)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract)
    assert drawn.microbatches.images.sharding.spec == PartitionSpec(None, "data")
    assert drawn.microbatches.images.ndim == (6 if frames == 1 else 7) and drawn.num_microbatches == 2
    rows = TrainRows(store, config, microbatch_rows=4)
    for index in range(2):
        expected = next(rows)
        for name in ("images", "image_valid", "image_index", "first_image", "loss_weights"):
            assert np.array_equal(getattr(drawn.microbatches, name)[index], getattr(expected, name))
    assert drawn.microbatches.image_valid[:2].any() and not drawn.microbatches.image_valid[2].any()
