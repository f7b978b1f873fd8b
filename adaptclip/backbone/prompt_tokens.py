"""How a tokenizer lays out a prompt, and which tokens words have wherever they stand in one.

Every tokenizer writes `start words end fill…`: CLIP's BPE `SOS words EOT 0…`, WordPiece `[CLS] words [SEP] [PAD]…`, T5
and SigLIP `words </s> fill…`, NLLB a language before the words. CLIPS puts one more token behind the fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text
from torch import Tensor

from adaptclip.errors import BackboneError

_PROBE = "a"
_ROOM = 12


class PromptTokens:
    """The layout of one tokenizer's prompts, found by asking it, and the tokens of words.

    Args:
        tokenizer: of open_clip, for CLIP's vocabulary or around one of Hugging Face's.

    Raises:
        BackboneError: the tokenizer is of another kind, or writes prompts in another order (left padding, for example).

    Attributes:
        start_ids: special tokens before the words.
        end_ids: special tokens after the words.
        fill_id: what the rest of the context is filled with; may be the same as an end token.
        last_ids: special tokens behind the fill, at the end of the context; nearly always none.
        context_length: tokens that the tokenizer writes by itself.
        highest_id: largest id of its vocabulary.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer, open_clip.SimpleTokenizer | HFTokenizer | SigLipTokenizer):
            raise BackboneError(
                f"prompts cannot be taken apart with a {type(tokenizer).__name__}; known are open_clip's "
                "SimpleTokenizer and HFTokenizer"
            )
        self._tokenizer: Any = tokenizer
        self.context_length = int(self._tokenizer.context_length)
        simple = isinstance(tokenizer, open_clip.SimpleTokenizer)
        self.highest_id: int = (tokenizer.vocab_size if simple else len(tokenizer.tokenizer)) - 1
        words = self._words(_PROBE)
        row = self._row(_PROBE, len(words) + _ROOM)
        start = next((i for i in range(len(row)) if words and row[i : i + len(words)] == words), None)
        if start is None:
            raise self._unknown_layout(row)
        after = row[start + len(words) :]
        num_end = 1 if simple else self._num_specials() - start
        if not 0 <= num_end < len(after) - 1:
            raise self._unknown_layout(row)
        self.start_ids, self.end_ids = tuple(row[:start]), tuple(after[:num_end])
        self.fill_id = after[num_end]
        self.last_ids = () if after[-1] == self.fill_id else (after[-1],)
        if row != self.filled(words, len(row)):
            raise self._unknown_layout(row)

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut.

        Args:
            texts: what to tokenize.
            after: what stands before each text in the prompt. Some tokenizers write a word otherwise at the start of a
                text than after a space ("rose" and "▁rose" in Gemma's, "rose" and "Ġrose" in RoBERTa's), and a full
                stop otherwise after a space than after a word.
        """
        lead = self._words(after.rstrip()) if after else []
        found = []
        for text in texts:
            ids = self._words(after + text) if lead else []
            # Where the text melts into what stands before it, its tokens cannot be told apart.
            found.append(ids[len(lead) :] if lead and ids[: len(lead)] == lead else self._words(text))
        return found

    def filled(self, words: Sequence[int], length: int) -> list[int]:
        """Returns the `length` ids that the tokenizer writes for a prompt of these words."""
        own = [*self.start_ids, *words, *self.end_ids]
        return [*own, *[self.fill_id] * (length - len(own) - len(self.last_ids)), *self.last_ids]

    def end_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last token before the fill in (C, L) prompts."""
        if self.last_ids:
            ids = ids[:, :-1]
        is_fill = ids == self.fill_id
        own = ids.shape[1] - is_fill.int().flip(-1).cumprod(dim=-1).sum(dim=-1)
        # An end token that looks like the fill belongs to the prompt all the same.
        alike = sum(1 for end in self.end_ids if end == self.fill_id)
        return (own + alike).clamp(max=ids.shape[1]) - 1

    def _words(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return list(tokenizer.encode(text))
        if isinstance(tokenizer, SigLipTokenizer):
            cleaned = canonicalize_text(basic_clean(text))
        else:
            cleaned = tokenizer.clean_fn(text)
        return list(tokenizer.tokenizer(cleaned, add_special_tokens=False).input_ids)

    def _row(self, text: str, length: int) -> list[int]:
        return self._tokenizer([text], context_length=length)[0].tolist()

    def _num_specials(self) -> int:
        """How many special tokens a prompt has before the fill."""
        if getattr(self._tokenizer, "tokenizer_mode", ""):
            return 2  # CLIPS: open_clip itself writes a start and an end token
        return len(self._tokenizer.tokenizer(_PROBE).input_ids) - len(self._words(_PROBE))

    def _unknown_layout(self, row: list[int]) -> BackboneError:
        return BackboneError(
            f"prompts cannot be learnt with this tokenizer: it writes {_PROBE!r} as {row[:_ROOM]}…, which is not "
            "`start words end fill…`. If it pads on the left, set padding_side to right in its tokenizer_config.json."
        )
