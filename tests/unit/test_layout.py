"""Layouts: every layer in exactly one stage, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import Layout, StageSlice, even_boundaries, make_layout


@given(num_layers=st.integers(1, 130), data=st.data())
def test_an_even_split_covers_every_layer_once_and_is_even(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    layout = make_layout(
        num_layers=num_layers, boundaries=even_boundaries(num_layers=num_layers, num_stages=num_stages)
    )
    assert [layer for part in layout.slices for layer in part.layers] == list(range(num_layers))
    sizes = [len(part.layers) for part in layout.slices]
    assert len(sizes) == num_stages == layout.num_stages
    assert max(sizes) - min(sizes) <= 1
    # The ends hold embedding and LM head too: no end is larger than a stage in the middle.
    assert num_stages < 3 or max(sizes[0], sizes[-1]) <= max(sizes[1:-1])


@given(num_layers=st.integers(1, 60), boundaries=st.lists(st.integers(-2, 62), max_size=8))
def test_boundaries_make_a_layout_or_are_refused(num_layers, boundaries):
    valid = all(0 < b < num_layers for b in boundaries) and boundaries == sorted(set(boundaries))
    if not valid:
        with pytest.raises(ConfigError):
            make_layout(num_layers=num_layers, boundaries=boundaries)
        return
    layout = make_layout(num_layers=num_layers, boundaries=boundaries)
    assert list(layout.boundaries) == boundaries
    assert layout.num_layers == num_layers


def test_more_stages_than_layers_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="99 stages for 30 layers"):
        even_boundaries(num_layers=30, num_stages=99)


def test_a_stage_occurs_once():
    with pytest.raises(ConfigError, match="twice"):
        Layout((StageSlice("a", 0, 1), StageSlice("a", 1, 2)))
