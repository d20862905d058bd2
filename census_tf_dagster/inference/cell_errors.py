"""The error for callers that need an embedding of every cell. Imports no torch, so that any process can catch it."""


class NonFiniteError(ArithmeticError):
    """The model gives NaN or infinity for some cells.

    Attributes
    ----------
    set_aside
        The reason for each cell without an embedding, by the cell's position.
    """

    def __init__(self, set_aside: dict[int, str]) -> None:
        super().__init__(
            f"{len(set_aside)} cells have embeddings that are not finite, positions {list(set_aside)[:10]}. "
            f"The first cell: {next(iter(set_aside.values()))}"
        )
        self.set_aside = set_aside
