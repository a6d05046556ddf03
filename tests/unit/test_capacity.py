"""KV capacity: no domain is overcommitted, and the smallest decides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kv.capacity import StageFootprint, max_blocks

MIB = 1 << 20


@given(
    stages=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.integers(0, 50 * MIB), st.integers(0, 50 * MIB)),
        min_size=1,
        max_size=6,
    ),
    budgets=st.fixed_dictionaries({"a": st.integers(0, 400 * MIB), "b": st.integers(0, 400 * MIB)}),
    block_bytes=st.integers(1, MIB),
)
def test_the_answer_fits_every_budget_and_one_more_does_not(stages, budgets, block_bytes):
    footprints = [
        StageFootprint(stage=str(i), domain=d, num_layers=n, weights_bytes=w, overhead_bytes=o)
        for i, (d, n, w, o) in enumerate(stages)
    ]

    def fits(num_blocks):
        return all(
            sum(f.weights_bytes + f.overhead_bytes + num_blocks * f.num_layers * block_bytes for f in members)
            <= budgets[domain]
            for domain in {f.domain for f in footprints}
            if (members := [f for f in footprints if f.domain == domain])
        )

    if not fits(1):
        with pytest.raises(ConfigError, match="memory budget of domain"):
            max_blocks(footprints=footprints, budgets=budgets, block_bytes=block_bytes)
        return
    found = max_blocks(footprints=footprints, budgets=budgets, block_bytes=block_bytes)
    assert fits(found)
    assert not fits(found + 1)
