"""Vectors of the long-term store: how they are stored, and compared. Pure."""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Sequence
from typing import Any

import ormsgpack

Vector = Sequence[float]


def pack(vectors: Sequence[Vector]) -> bytes:
    """Return vectors as bytes: 4 a number where that loses nothing (most models give such), else 8."""
    packed = []
    for vector in vectors:
        try:
            data = struct.pack(f"<{len(vector)}f", *vector)
            exact = struct.unpack(f"<{len(vector)}f", data) == tuple(vector)
        except OverflowError:
            exact = False
        packed.append(["f", data] if exact else ["d", struct.pack(f"<{len(vector)}d", *vector)])
    return ormsgpack.packb(packed)


def unpack(data: bytes | None) -> list[Vector]:
    """Return the vectors that `pack` has packed; none for None."""
    if data is None:
        return []
    return [
        struct.unpack(f"<{len(raw) // (4 if code == 'f' else 8)}{code}", raw) for code, raw in ormsgpack.unpackb(data)
    ]


def cosine(query: Vector, vectors: Sequence[Vector]) -> list[float]:
    """Return how alike `query` is to each of `vectors`, all of its length; with NumPy where that is installed."""
    if not vectors:
        return []
    if _numpy is not None:
        return _cosine_numpy(query, vectors)
    length = sum(a * a for a in query) ** 0.5
    scores = []
    for vector in vectors:
        other = sum(a * a for a in vector) ** 0.5
        dot = sum(a * b for a, b in zip(query, vector, strict=True))
        scores.append(dot / (length * other) if length > 0 and other > 0 else 0.0)
    return scores


def _cosine_numpy(query: Vector, vectors: Sequence[Vector]) -> list[float]:
    one, many = _numpy.asarray(query, dtype=float), _numpy.asarray(vectors, dtype=float)
    lengths = _numpy.linalg.norm(many, axis=1) * _numpy.linalg.norm(one)
    scores = _numpy.zeros(len(many))
    some = lengths != 0
    scores[some] = many[some] @ one / lengths[some]
    return [float(score) for score in scores]


_numpy: Any = importlib.import_module("numpy") if importlib.util.find_spec("numpy") else None
