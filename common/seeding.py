"""Seeds that depend on their purpose, never on what ran before."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and their order, e.g. ("augment", seed, epoch, index).

    Seeds of different parts are unrelated. Sums or products of the parts would not be.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
