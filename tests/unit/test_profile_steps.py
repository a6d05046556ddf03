"""Synthetic steps are steps that a stage would take."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.model.profile_steps import Row, decodes, make_step, num_blocks_of, shape_of
from flexpipe_serve.pipeline.messages import decode_header, decode_step
from flexpipe_serve.pipeline.step_check import check_batch

ROWS = st.lists(st.builds(Row, st.integers(0, 200), st.integers(1, 90), st.booleans()), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, block_size=st.integers(1, 40))
def test_a_stage_would_take_them(rows: list[Row], block_size: int) -> None:
    num_blocks = num_blocks_of(rows, block_size=block_size)
    sent = make_step(rows, block_size=block_size, vocab_size=131, num_threads=1)
    frames = sent.encode()
    header = decode_header(frames[0])
    batch = decode_step(header, frames[1:])  # type: ignore[arg-type]
    check_batch(batch, num_blocks=num_blocks, block_size=block_size, vocab_size=131, max_model_len=290)
    used = [
        int(block)
        for row, table in zip(rows, batch.block_tables, strict=True)
        for block in table[: -(-(row.num_computed + row.num_new) // block_size)]
    ]
    assert used == list(range(num_blocks))


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_shape_counts_what_is_computed(rows: list[Row]) -> None:
    shape = shape_of(rows)
    assert shape.num_tokens == sum(row.num_new for row in rows)
    assert shape.num_samples == sum(row.is_sampled for row in rows)
    pairs = sum(row.num_computed + 1 + i for row in rows if row.num_new > 1 for i in range(row.num_new))
    assert shape.num_pairs == pairs
    assert shape.num_context_tokens == sum(row.num_computed for row in rows if row.num_new == 1)


def test_decodes() -> None:
    shape = shape_of(decodes(8, context=100))
    assert (shape.num_tokens, shape.num_samples, shape.num_context_tokens, shape.num_pairs) == (8, 8, 800, 0)
