"""What a port is opened with: the options whose defaults cost memory, connections or half of the traffic."""

import pytest

from proxy_usage.errors import ListenError
from proxy_usage.receiver.port import ReceiverLimits, check_free, options


def test_memory_is_bounded_and_a_second_process_is_refused() -> None:
    given = dict(options(ReceiverLimits(message=64 << 20, window=1 << 20, connections=7)))
    assert given["grpc.so_reuseport"] == 0
    assert given["grpc.http2.bdp_probe"] == 0
    assert given["grpc.http2.lookahead_bytes"] == given["grpc.http2.max_frame_size"] == 1 << 20
    assert given["grpc.max_receive_message_length"] == 64 << 20
    assert given["grpc.max_allowed_incoming_connections"] == 7


def test_frames_stay_within_what_http2_allows() -> None:
    assert dict(options(ReceiverLimits(window=1_000)))["grpc.http2.max_frame_size"] == 16_384
    assert dict(options(ReceiverLimits(window=64 << 20)))["grpc.http2.max_frame_size"] == 16_777_215


def test_an_address_of_another_machine_is_not_called_a_port_in_use() -> None:
    with pytest.raises(ListenError) as caught:
        check_free("192.0.2.7", 9001)
    assert caught.value.hint == "listen.grpc must name an address of this machine"
