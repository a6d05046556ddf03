"""Channels: order, messages of any size, peers that are slow, gone or new, waking, and who may connect over tcp."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.inbox import Inbox, connect
from flexpipe_serve.pipeline.unix_channel import _pack, start_message

RECEIVE_S = 60.0
LARGE = 20 << 20
"""Far more than the kernel holds for a socket."""


@pytest.fixture
def make_inbox(tmp_path):
    boxes = []

    def make(name="in"):
        boxes.append(Inbox(name, folder=tmp_path, node="here"))
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


@pytest.fixture
def inbox(make_inbox):
    return make_inbox()


def outlet_to(inbox):
    return connect(inbox.endpoint, node="here")


def receive_all(inbox, count):
    messages = []
    while len(messages) < count:
        message = inbox.receive(RECEIVE_S)
        assert message is not None, f"only {len(messages)} of {count} messages came"
        messages.append([bytes(frame) for frame in message])
    return messages


def numbers(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def threads_that_send():
    return [thread for thread in threading.enumerate() if thread.name == "flexpipe-outlet"]


def test_messages_of_one_outlet_arrive_in_order(inbox):
    outlet = outlet_to(inbox)
    big = np.arange(100_000, dtype=np.int32)
    for i in range(20):
        outlet.send([str(i).encode(), big.data.cast("B")])
    got = receive_all(inbox, 20)
    assert [int(m[0]) for m in got] == list(range(20))
    assert all(m[1] == big.tobytes() for m in got)
    outlet.close()


@given(messages=st.lists(st.lists(st.integers(0, 70_000), max_size=8), min_size=1, max_size=12))
def test_messages_come_as_they_were_sent_whatever_their_frames(tmp_path_factory, messages):
    inbox = Inbox("in", folder=tmp_path_factory.mktemp("c"), node="here")
    outlet = outlet_to(inbox)
    sent = [[numbers(size, seed=size).data for size in sizes] for sizes in messages]
    for frames in sent:
        outlet.send(frames)
    for frames in sent:
        got = inbox.receive(RECEIVE_S)
        assert [bytes(frame) for frame in got] == [bytes(frame) for frame in frames]
        assert all(np.frombuffer(frame, np.uint8).ctypes.data % 16 == 0 for frame in got if len(frame))
    outlet.close()
    inbox.close()


@given(frames=st.lists(st.binary(max_size=40), max_size=4), last=st.binary(min_size=1, max_size=40))
def test_a_message_started_before_its_last_frame_is_the_same(frames, last):
    start = start_message(frames, num_last=len(last))
    whole = (bytes(start.bytes) + last).ljust(start.num_bytes, b"\0")
    assert whole == b"".join(_pack([*frames, last]))
    for frame, at in zip([*frames, last], start.offsets, strict=True):
        assert whole[at : at + len(frame)] == frame


def test_a_frame_of_numbers_of_several_dimensions_arrives_as_its_bytes(inbox):
    outlet = outlet_to(inbox)
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    outlet.send([table.data, np.empty((0, 4), np.int32).data])
    assert receive_all(inbox, 1) == [[table.tobytes(), b""]]
    outlet.close()


def test_sending_does_not_wait_for_a_receiver_who_does_not_look(inbox):
    outlet = outlet_to(inbox)
    large = numbers(LARGE)
    for i in range(3):  # the first fills the socket, the others have to wait behind it
        outlet.send([b"large %d" % i, large.data])
        outlet.send([b"small %d" % i])
    got = receive_all(inbox, 6)
    assert [m[0] for m in got] == [b"large 0", b"small 0", b"large 1", b"small 1", b"large 2", b"small 2"]
    assert all(m[1] == large.tobytes() for m in got[::2])
    for thread in threads_that_send():
        thread.join(RECEIVE_S)
    assert not threads_that_send()
    outlet.send([b"at once again"])
    assert receive_all(inbox, 1) == [[b"at once again"]]
    outlet.close()


def test_two_who_send_each_other_more_than_fits_do_not_block_each_other(make_inbox):
    inboxes = make_inbox("a"), make_inbox("b")
    outlets = [outlet_to(inbox) for inbox in inboxes]
    large = numbers(LARGE)
    for outlet in outlets:
        outlet.send([large.data])
    for inbox in inboxes:
        assert receive_all(inbox, 1) == [[large.tobytes()]]
    for outlet in outlets:
        outlet.close()


def test_many_messages_of_several_senders_keep_their_order(inbox):
    num_senders, num_messages = 4, 500

    def send(sender):
        outlet = outlet_to(inbox)
        for i in range(num_messages):
            outlet.send([bytes([sender]), str(i).encode(), bytes(i * 7)])
        outlet.close()

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(num_senders)]
    for thread in threads:
        thread.start()
    got = receive_all(inbox, num_senders * num_messages)
    for sender in range(num_senders):
        assert [int(m[1]) for m in got if m[0] == bytes([sender])] == list(range(num_messages))
    for thread in threads:
        thread.join()


def test_what_was_sent_before_a_close_arrives(inbox):
    outlet = outlet_to(inbox)
    large = numbers(LARGE)
    outlet.send([large.data])
    outlet.close()
    assert receive_all(inbox, 1) == [[large.tobytes()]]


def test_a_closed_outlet_lets_go_of_a_receiver_who_never_looks(inbox):
    outlet = outlet_to(inbox)
    outlet.send([numbers(LARGE).data])
    (thread,) = threads_that_send()
    outlet.close()
    thread.join(RECEIVE_S)
    assert not thread.is_alive()


def test_messages_to_a_receiver_that_is_gone_are_lost_and_raise_nothing(tmp_path):
    inbox = Inbox("in", folder=tmp_path, node="here")
    outlet, waiting = outlet_to(inbox), outlet_to(inbox)
    waiting.send([numbers(LARGE).data])
    inbox.close()
    for thread in threads_that_send():
        thread.join(RECEIVE_S)
    assert not threads_that_send()
    for gone in (outlet, waiting, outlet_to(inbox)):
        gone.send([b"x"])
        gone.send([b"y"])
        gone.close()


def test_a_sender_killed_in_the_middle_of_a_message_harms_nobody(inbox):
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_send_and_die, args=(inbox.endpoint,))
    child.start()
    child.join(RECEIVE_S)  # nobody has read: most of its second message dies with it
    assert receive_all(inbox, 1) == [[b"whole"]]
    assert inbox.receive(0.05) is None
    outlet = outlet_to(inbox)
    outlet.send([b"another"])
    assert receive_all(inbox, 1) == [[b"another"]]
    outlet.close()


def _send_and_die(endpoint):
    outlet = connect(endpoint, node="here")
    outlet.send([b"whole"])
    outlet.send([bytes(LARGE)])  # more than the kernel takes before somebody reads
    os._exit(1)


def test_a_new_receiver_takes_the_place_of_one_that_died(make_inbox, tmp_path):
    dead = Inbox("in", folder=tmp_path, node="here")
    new = make_inbox("in")  # while the old one's socket is still there
    outlet = outlet_to(dead)
    outlet.send([b"for the new one"])
    assert receive_all(new, 1) == [[b"for the new one"]]
    dead.close()  # must leave the new one's socket alone
    second = outlet_to(new)
    second.send([b"still there"])
    assert receive_all(new, 1) == [[b"still there"]]
    for used in (outlet, second):
        used.close()


def test_wake_interrupts_a_wait_without_a_message(inbox):
    inbox.wake()
    assert inbox.receive(RECEIVE_S) is None


def test_a_wake_loses_no_message(inbox):
    outlet = outlet_to(inbox)
    outlet.send([b"x"])
    inbox.wake()
    assert [m for m in (inbox.receive(0.0) for _ in range(3)) if m is not None] == [[b"x"]]
    outlet.close()


def test_waiting_ends_with_the_time(inbox):
    started = time.monotonic()
    assert inbox.receive(0.05) is None
    assert 0.04 < time.monotonic() - started < RECEIVE_S


def test_tcp_carries_messages_between_nodes(tmp_path):
    keys = CurveKeys.generate()
    inbox = Inbox("a", folder=tmp_path, node="there", keys=keys)
    outlet = connect(inbox.endpoint, node="here", keys=keys)
    beside = connect(inbox.endpoint, node="there", keys=keys)
    outlet.send([b"x", b"y"])
    assert receive_all(inbox, 1) == [[b"x", b"y"]]
    beside.send([b"z"])
    assert receive_all(inbox, 1) == [[b"z"]]
    outlet.close()
    beside.close()
    inbox.close()


def test_tcp_refuses_a_stranger_who_knows_the_server_key(tmp_path):
    keys, stranger = CurveKeys.generate(), CurveKeys.generate()
    inbox = Inbox("a", folder=tmp_path, node="there", keys=keys)
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.curve_serverkey = keys.public.encode()
    push.curve_publickey = stranger.public.encode()
    push.curve_secretkey = stranger.secret.encode()
    push.connect(inbox.endpoint.tcp)
    push.send(b"intruder")
    friend = connect(inbox.endpoint, node="here", keys=keys)
    friend.send([b"friend"])
    assert receive_all(inbox, 1) == [[b"friend"]]
    assert inbox.receive(0.3) is None
    context.destroy(linger=0)
    friend.close()
    inbox.close()


def test_tcp_without_keys_is_refused(inbox):
    with pytest.raises(ValueError, match="needs tcp keys"):
        connect(inbox.endpoint, node="elsewhere")
