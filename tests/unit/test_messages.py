"""The wire format: what is sent is what arrives, and rubbish is refused."""

import msgspec
import numpy as np
import pytest

from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    HiddenHeader,
    LogprobResult,
    PromptLogprobSpec,
    ResultHeader,
    SampleSpec,
    StepBatch,
    StepHeader,
    decode_header,
    decode_step,
    decode_tokens,
    encode,
)


def test_a_step_survives_the_wire():
    header = StepHeader(
        epoch=3,
        step=9,
        num_seqs=2,
        num_tokens=4,
        table_width=2,
        num_threads=1,
        samples=(SampleSpec(row=1, position=7, seed=2**62, temperature=0.5, logit_bias=((5, -1.0),), num_history=2),),
        prompt_logprobs=(PromptLogprobSpec(row=0, num_targets=3, num_logprobs=0),),
    )
    batch = StepBatch(
        header=header,
        token_ids=np.arange(4, dtype=np.int32),
        num_computed=np.array([0, 6], np.int32),
        num_new=np.array([3, 1], np.int32),
        block_tables=np.array([[4, 0], [7, 9]], np.int32),
        histories=np.array([1, 2], np.int32),
        targets=np.empty(0, np.int32),
    )
    frames = batch.encode()
    received = decode_header(bytes(frames[0]))
    assert received == header
    got = decode_step(received, [bytes(frame) for frame in frames[1:]])
    for name in ("token_ids", "num_computed", "num_new", "block_tables", "histories", "targets"):
        np.testing.assert_array_equal(getattr(got, name), getattr(batch, name))


@pytest.mark.parametrize(
    "header",
    [
        HiddenHeader(epoch=1, step=2, shape=(3, 4), dtype="float32"),
        ResultHeader(epoch=1, step=2, stage_seconds=(0.1, 0.2), logprobs=(None, LogprobResult(-0.5, ((3, -0.5),)))),
        FailureHeader(epoch=1, step=2, stage="stage-0", message="no"),
    ],
)
def test_headers_survive_the_wire(header):
    frames = encode(header, np.array([5, 6], np.int32).data.cast("B"))
    assert decode_header(bytes(frames[0])) == header
    assert decode_tokens(bytes(frames[1])) == [5, 6]


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x91\xa4nope", msgspec.msgpack.encode({"step": 1})])
def test_rubbish_is_refused(frame):
    with pytest.raises(msgspec.MsgspecError):
        decode_header(frame)
