"""The error about cells that have no embedding, for callers that can do without none of them. Imports no torch."""


class NonFiniteError(ArithmeticError):
    """The model gives NaN or infinity for some cells.

    Attributes
    ----------
    set_aside
        Why a cell has no embedding, by its position.
    """

    def __init__(self, set_aside: dict[int, str]) -> None:
        super().__init__(
            f"{len(set_aside)} cells have embeddings that are not finite, positions {list(set_aside)[:10]}. "
            f"Of the first: {next(iter(set_aside.values()))}"
        )
        self.set_aside = set_aside
