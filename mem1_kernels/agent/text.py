"""Text between tokenizer, policy, environment and terminal.

Three kinds of text meet here. What this package writes (prompts, tags, hints) is *trusted*: a tag
in it is encoded with the tokenizer's own id for it, where it has one. What comes from outside
(questions, pages, replies of tools) is *foreign*: it never yields a control token, whatever stands
in it. What the policy wrote is ids, and is decoded for reading only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from mem1_kernels.agent.tags import Content, Tags

# Texts that no piece is likely to merge with, for tokenizers that put a blank before each text.
_ANCHORS = ("=", "|", "#", "~", "0", ".", "\n")

_CUT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """Text to token ids and back, for one tokenizer and one set of tags.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tags: the environment's. Their marks, where the tokenizer has tokens of their own for them
            (added ones, special or not), are encoded as these in trusted text.
    """

    def __init__(self, tokenizer: Any, tags: Tags) -> None:
        self.tokenizer = tokenizer
        self.tags = tags
        added = {t: i for t, i in tokenizer.get_added_vocab().items() if len(t) > 1 and t.strip()}
        self._control_ids = frozenset(added.values())
        self._controls = _any_of(added)
        marks = {mark: added[mark] for mark in getattr(tags, "marks", ()) if mark in added}
        self._mark_ids = marks
        self._marks = _any_of(marks)

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def _joins(self) -> bool:
        """Whether texts that were encoded one by one read as one text once they are joined."""
        pieces = ("one", "two", "\n\n<three>", "4")
        ids = [token for piece in pieces for token in self._raw(piece)]
        return self.decode(ids) == "".join(pieces)

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer has a token for each of the ids; a model may have more ids."""
        return self._known_ids.issuperset(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text without BOS, EOS and padding; other special tokens may be the tags."""
        own = self.tokenizer
        silent = {own.bos_token_id, own.eos_token_id, own.pad_token_id}
        return own.decode(
            [i for i in ids if i not in silent],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def whole_characters(self, ids: list[int], text: str) -> list[int]:
        """`ids`, the first of those of `text`, without a character of which they hold a part."""
        while ids:
            read = self.decode(ids)
            cut = read.endswith(_CUT) and not text[: len(read)].endswith(_CUT)
            if not cut:
                break
            ids = ids[:-1]
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of foreign text that stands behind other text. None of them is a control token."""
        ids: list[int] = []
        for piece in _cut(text, self._controls, inside=True):
            ids += self._foreign(piece)
        return ids

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of trusted text behind other text: marks of the tags with their own ids."""
        ids: list[int] = []
        for piece in _cut(text, self._marks):
            mark = self._mark_ids.get(piece)
            ids += self.encode(piece) if mark is None else [mark]
        return ids

    def prompt(self, prompt: Content) -> list[int]:
        """A prompt as the policy reads it: as the user's message, where the model chats.

        Tags of the environment are trusted in it (an environment that puts foreign text into its
        prompt guards it, see `TagSet.guard`); no other control token is read, so no question can
        end the user's message.

        Raises:
            ValueError: a chat template that does not show the user's message once.
        """
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template is None:
            begin = self.tokenizer.encode("")[:1]  # a BOS token, where the tokenizer puts one
            ids = [i for i in begin if i == self.tokenizer.bos_token_id]
            return ids + (self._raw(prompt) if self._plain(prompt) else self.encode_trusted(prompt))
        if self._plain(prompt):
            return self._as_message(prompt, tokenize=True)
        before, after = self._around
        whole = self.tokenizer.encode
        first, last = (whole(end, add_special_tokens=False) for end in (before, after))
        return [*first, *self.encode_trusted(prompt), *last]

    @cached_property
    def opened(self) -> str:
        """What the chat template leaves open of a tag at its end, such as "<think>\\n", or "".

        Models that are trained so never write that tag; it counts as written.
        """
        if self.tokenizer.chat_template is None:
            return ""
        marks = getattr(self.tags, "marks", ())
        opening = [mark for mark in marks if not mark.startswith("</")]
        found = re.search(f"(?:{'|'.join(map(re.escape, opening))})\\s*$", self._around[1])
        return found.group() if opening and found else ""

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the chat template puts before and behind a user's message."""
        mark = "prompt"
        while mark in self._as_message("", tokenize=False):
            mark += "-"
        ends = self._as_message(mark, tokenize=False).split(mark)
        if len(ends) != 2:
            raise ValueError(
                "tokenizer: expected a chat template that shows the user's message once, "
                f"got it {len(ends) - 1} times"
            )
        return ends[0], ends[1]

    def _as_message(self, content: str, *, tokenize: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_dict=False,
            tokenize=tokenize,
        )

    def _plain(self, text: str) -> bool:
        """Whether no control token is read in `text`, however it is encoded."""
        found = self._controls.search(text)
        return found is None and self._control_ids.isdisjoint(self._raw(text))

    def _foreign(self, text: str) -> list[int]:
        """Ids of text in which no control token stands as written.

        A tokenizer that normalizes may still read one; then the text is cut until it does not.
        """
        ids = self._behind(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        if len(text) < 2:
            return self._behind("\N{REPLACEMENT CHARACTER}")
        middle = len(text) // 2
        return self._foreign(text[:middle]) + self._foreign(text[middle:])

    def _behind(self, text: str) -> list[int]:
        """Ids of text that stands behind other text, with no blank put before it."""
        if self._joins or not text:
            return self._raw(text)
        for anchor in _ANCHORS:
            before, ids = self._raw(anchor), self._raw(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._raw(text)

    def _raw(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest first; never anything if there is none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _cut(text: str, what: re.Pattern[str], *, inside: bool = False) -> list[str]:
    """`text` cut around every match, or, `inside`, behind the first character of every match."""
    cuts = [0]
    for found in what.finditer(text):
        cuts += [found.start() + 1] if inside else [found.start(), found.end()]
    cuts.append(len(text))
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
