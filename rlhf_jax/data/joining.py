"""A prompt and what stands behind it: as tokens, and back as text.

The one place that opens a prompt, and the one place that tokenises a continuation: an
answer, a step, a separator. Training, sampling and the scoring of texts all use it.

A tokenizer in the style of SentencePiece puts a space of its own before every text, and
leaves it out again where it decodes. An answer is no text by itself but goes on behind
a prompt, where there is no such space: ``Assistant:`` + `` Yes`` is ``▁Assistant:`` +
``▁Yes``, not ``▁ ▁Yes``. :class:`Joint` tokenises such an answer behind a short text,
the anchor, whose tokens are then dropped, and decodes a response likewise. With other
tokenizers a text has the same tokens everywhere, and no anchor is used. Read
``rows.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.tokenizer import encode, frame, opened

Encoder = Callable[[PreTrainedTokenizerBase, list[str]], list[list[int]]]

# Texts to stand before a continuation. The first whose tokens stay what they are, with
# none that reaches across, is used: several, since any may merge with some text.
ANCHORS = (':', 'a', '0', '\n')
PROBE = 'a'


class Anchor(NamedTuple):
    """A text before a continuation."""

    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Joint:
    """How a tokenizer writes texts that stand behind other tokens."""

    tokenizer: PreTrainedTokenizerBase
    anchors: tuple[Anchor, ...]  # none: a text has the same tokens everywhere

    def encode(
        self,
        before: Sequence[int | None],
        texts: Sequence[str],
        encoder: Encoder = encode,
    ) -> list[list[int]]:
        """Ids of texts, each of which goes on behind other tokens.

        Args:
            before: N, the last id before each text; None for one that is not known.
            texts: N texts.
            encoder: ``tokenizer.encode``, or what gives the same.

        Raises:
            ValueError: no anchor's tokens stay apart from those of a text.
        """
        if not self.anchors:
            return encoder(self.tokenizer, list(texts))
        anew = self._anew(before)
        heads = ['' if b in anew else self.anchors[0].text for b in before]
        rows = encoder(self.tokenizer, [h + t for h, t in zip(heads, texts)])
        return [
            self._ids_behind(text, ids, encoder) if head else ids
            for head, text, ids in zip(heads, texts, rows)
        ]

    def decode(
        self, before: Sequence[int | None], rows: Sequence[Sequence[int]]
    ) -> list[str]:
        """Texts of ids, each of which goes on behind other tokens; special tokens are
        left out.

        Args:
            before: N, the last id before each row; None for one that is not known.
            rows: N rows of ids.
        """
        if not self.anchors:
            return self._decoded(rows)
        anew = self._anew(before)
        heads = [[] if b in anew else self.anchors[0].ids for b in before]
        texts = self._decoded([[*head, *row] for head, row in zip(heads, rows)])
        (start,) = self._decoded([self.anchors[0].ids])
        return [
            text
            if not head
            else text[len(start) :]
            if text.startswith(start)
            else self._text_behind(row)
            for head, row, text in zip(heads, rows, texts)
        ]

    def _anew(self, before: Sequence[int | None]) -> set[int]:
        """The ids behind which the tokenizer begins a text anew: behind an added token
        (a template's ``<|assistant|>``) some put their own space again.
        """
        added = self.tokenizer.added_tokens_decoder if self.anchors else {}
        result = set()
        for token in {i for i in before if i in added}:
            texts = [f'{added[token].content}{PROBE}', PROBE]
            joined, alone = encode(self.tokenizer, texts)
            if joined == [token, *alone]:
                result.add(token)
        return result

    def _ids_behind(self, text: str, ids: list[int], encoder: Encoder) -> list[int]:
        """The ids of a text behind those of an anchor; ``ids`` are with the first."""
        for anchor in self.anchors:
            if anchor is not self.anchors[0]:
                (ids,) = encoder(self.tokenizer, [anchor.text + text])
            if ids[: len(anchor.ids)] == anchor.ids:
                return ids[len(anchor.ids) :]
        raise ValueError(
            f'tokenizer {self.tokenizer.name_or_path!r} cannot write {text[:40]!r} '
            'behind another text: it merges with each of '
            f'{[anchor.text for anchor in self.anchors]}; change how the text begins'
        )

    def _text_behind(self, row: Sequence[int]) -> str:
        """The text of a row behind that of another anchor than the first."""
        for anchor in self.anchors[1:]:
            head, joined = self._decoded([anchor.ids, [*anchor.ids, *row]])
            if joined.startswith(head):
                return joined[len(head) :]
        # Bytes that are no character by themselves, behind anchors made of bytes.
        return self._decoded([row])[0]

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def find_joint(tokenizer: PreTrainedTokenizerBase) -> Joint:
    """Finds out whether a tokenizer writes a text in another way behind others."""
    alone, *pairs = encode(
        tokenizer, [PROBE, *(x for a in ANCHORS for x in (a, a + PROBE))]
    )
    anchors, differs = [], []
    for text, ids, joined in zip(ANCHORS, pairs[::2], pairs[1::2]):
        behind = joined[len(ids) :]  # none where one unknown word is all that there is
        known = ids and tokenizer.unk_token_id not in ids
        if known and behind and joined[: len(ids)] == ids:
            anchors.append(Anchor(text, ids))
            differs.append(behind != alone)
    return Joint(tokenizer, tuple(anchors) if any(differs[:1]) else ())


def decode_behind(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int | None],
    rows: Sequence[Sequence[int]],
) -> list[str]:
    """:meth:`Joint.decode` for callers that decode once."""
    return find_joint(tokenizer).decode(before, rows)


def open_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    templated: Sequence[bool],
    encoder: Encoder = encode,
) -> list[list[int]]:
    """Ids of prompts as a model reads them: what the tokenizer puts before every text
    (BOS) stands before each, but for those that a chat template has written, which
    bring their own beginning.

    Args:
        tokenizer: of the model.
        texts: N prompts.
        templated: N, whether a chat template wrote the prompt.
        encoder: ``tokenizer.encode``, or what gives the same.

    Returns:
        N rows of ids; none for a text without tokens.
    """
    bos, _ = frame(tokenizer)
    rows = encoder(tokenizer, list(texts))
    return [
        opened(ids, bos) if ids and not whole else ids
        for ids, whole in zip(rows, templated)
    ]


def last_id(ids: Sequence[int]) -> int | None:
    """The last of some ids; None where there are none."""
    return ids[-1] if ids else None
