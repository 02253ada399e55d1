"""The gRPC listeners: who is let in, how much they may make the process hold, and their rows, as bytes."""

from proxy_usage.receiver.credentials import TlsFiles
from proxy_usage.receiver.port import ReceiverLimits, reserve
from proxy_usage.receiver.receiver import SERVICE, Receiver, Sink, Tap
from proxy_usage.receiver.room import Room, RoomLimits

__all__ = [
    "SERVICE",
    "Receiver",
    "ReceiverLimits",
    "Room",
    "RoomLimits",
    "Sink",
    "Tap",
    "TlsFiles",
    "reserve",
]
