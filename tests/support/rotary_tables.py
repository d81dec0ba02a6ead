"""The products by which a CPU doubles rotary tables, which no plan counts."""


def table_flops(positions: int, width: int) -> int:
    """Return the FLOPs of the two tables, of cosines and of sines, ``[positions, width / 2]``."""
    return 2 * 2 * positions * (width // 2) * width
