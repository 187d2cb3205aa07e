"""Which text each token of a sequence is, also where a character takes several tokens."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what decoders write for a part of a character; a message may hold it too
MORE = 3  # a character takes four tokens at most


def texts_of_tokens(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[str]:
    """Text of each token, which join to `decode(tokens)`; the text of a split character stands at its last token.

    Each token is decoded behind the one before it, since decoders write the first token of all in another way than others.
    """
    ids = [int(token) for token in tokens]
    known: dict[tuple[int, ...], str] = {}

    def text_of(start: int, end: int) -> str:
        window = tuple(ids[start:end])
        if window not in known:
            known[window] = decode(list(window))
        return known[window]

    texts = [""] * len(ids)
    begin = done = 0  # the window's first token, and the first one whose text is not known yet
    for i in range(len(ids)):
        text = text_of(begin, i + 1)
        ahead = range(i + 2, min(i + 1 + MORE, len(ids)) + 1) if text.endswith(INCOMPLETE) else ()
        longer = (text_of(begin, end) for end in ahead)
        if all(len(more) > len(text) and more.startswith(text) for more in longer):  # else the next token belongs to it
            texts[i] = text[len(text_of(begin, done)) :]
            begin, done = done, i + 1
    return texts
