"""The wire format of protocol buffers, read without the messages' definitions."""

from collections.abc import Iterator
from typing import Any


def varints(packed: Any) -> list[int]:
    """A packed field of signed integers, or the one integer of a field that is not packed."""
    if isinstance(packed, int):
        return [packed]
    numbers, place = [], 0
    while place < len(packed):
        number, place = _varint(packed, place)
        numbers.append(number - (1 << 64) if number >= 1 << 63 else number)
    return numbers


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
        if byte < 128:
            return number, place


def fields_of(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: bytes, or the int of a varint. Raises ValueError or IndexError."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size, place = (4, place) if tag & 7 == 5 else _varint(data, place)
        if tag & 7 not in (2, 5) or place + size > len(data):
            raise ValueError("no protocol buffer")
        yield tag >> 3, data[place : place + size]
        place += size
