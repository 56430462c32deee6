"""Which tokens are packed when."""

BLOCK = 64  # tokens that are packed together
LAG = 16  # tokens that a seal stays behind the window, so that a speculative rollback never lands in codes


def tokens_to_seal(newest: int, window: int) -> int:
    """How many of the oldest of `newest` exact tokens (sinks not counted) are packed now: whole blocks, such that
    `window` + LAG tokens stay exact.

    Hence after n tokens without a trim, the packed ones are max(0, n - sinks - window - LAG) // BLOCK * BLOCK.
    """
    return max(0, newest - window - LAG) // BLOCK * BLOCK


def packed_of(tokens: int, window: int, sinks: int) -> int:
    """How many of `tokens` are packed, when none was trimmed."""
    return tokens_to_seal(tokens - sinks, window)
