"""Which of n things belong together: union-find."""


class Clusters:
    """Each of the numbers 0 to n - 1 begins alone. The root of a cluster is its least number."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def root(self, i: int) -> int:
        """The number that stands for the whole cluster."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """The two belong together from now on."""
        i, j = sorted((self.root(i), self.root(j)))
        self._parent[j] = i

    def together(self, i: int, j: int) -> bool:
        """Whether they belong together so far."""
        return self.root(i) == self.root(j)
