"""Channels: order, zero copy of large frames, waking, and who may connect over tcp."""

import numpy as np
import pytest
import zmq

from flexpipe_serve.pipeline.channel import CurveKeys, ZmqInbox, ZmqOutlet

RECEIVE_S = 10.0


@pytest.fixture
def inbox(tmp_path):
    box = ZmqInbox("in", folder=tmp_path, node="here", keys=CurveKeys.generate())
    yield box
    box.close()


def receive_all(inbox, count):
    messages = []
    while len(messages) < count:
        message = inbox.receive(RECEIVE_S)
        assert message is not None, f"only {len(messages)} of {count} messages came"
        messages.append([bytes(frame) for frame in message])
    return messages


def test_messages_of_one_outlet_arrive_in_order(inbox):
    outlet = ZmqOutlet(inbox.endpoint, node="here")
    big = np.arange(100_000, dtype=np.int32)
    for i in range(20):
        outlet.send([str(i).encode(), big.data.cast("B")])
    got = receive_all(inbox, 20)
    assert [int(m[0]) for m in got] == list(range(20))
    assert all(m[1] == big.tobytes() for m in got)
    outlet.close()


def test_wake_interrupts_a_wait_without_a_message(inbox):
    inbox.wake()
    assert inbox.receive(RECEIVE_S) is None


def test_tcp_carries_messages_between_nodes(tmp_path):
    keys = CurveKeys.generate()
    inbox = ZmqInbox("a", folder=tmp_path, node="there", keys=keys)
    outlet = ZmqOutlet(inbox.endpoint, node="here", keys=keys)
    outlet.send([b"x", b"y"])
    assert receive_all(inbox, 1) == [[b"x", b"y"]]
    outlet.close()
    inbox.close()


def test_tcp_refuses_a_stranger_who_knows_the_server_key(tmp_path):
    keys, stranger = CurveKeys.generate(), CurveKeys.generate()
    inbox = ZmqInbox("a", folder=tmp_path, node="there", keys=keys)
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.curve_serverkey = keys.public.encode()
    push.curve_publickey = stranger.public.encode()
    push.curve_secretkey = stranger.secret.encode()
    push.connect(inbox.endpoint.tcp)
    push.send(b"intruder")
    friend = ZmqOutlet(inbox.endpoint, node="here", keys=keys)
    friend.send([b"friend"])
    assert receive_all(inbox, 1) == [[b"friend"]]
    assert inbox.receive(0.3) is None
    context.destroy(linger=0)
    friend.close()
    inbox.close()


def test_tcp_without_keys_is_refused(inbox):
    with pytest.raises(ValueError, match="needs tcp keys"):
        ZmqOutlet(inbox.endpoint, node="elsewhere")
