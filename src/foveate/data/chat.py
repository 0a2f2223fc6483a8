"""A conversation as a chat template writes it: where in the text its answers are, how they end, and how a question is put."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.footage import CLIP, MARKER, VIDEO
from foveate.data.spelled import BEGIN, END
from foveate.errors import FoveateError

Turns = Sequence[tuple[str, str]]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenised:
    """Token ids of one conversation, with one image token per image or as many as there are visual tokens, and which are supervised."""

    ids: np.ndarray
    supervised: np.ndarray


def takes_videos(processor: Any) -> bool:
    """Whether a processor takes clips; to others their frames are pictures."""
    return getattr(processor, "video_processor", None) is not None


class Renderer:
    """What the chat template of a processor makes of conversations.

    The span of an answer begins where the prompt of a question ends and goes up to and with the token that ends the turn. What the
    template writes of itself between the two, such as the empty thought of Qwen3, belongs to the prompt, in training and in questions.
    `end_id` is the token that ends a turn. A template that writes none (such as LLaVA-1.5's in transformers) gets the tokenizer's end of
    sequence, `end`, put after each answer, because a model that never sees an end never learns to stop. `videos`: whether the processor
    takes clips as they are; CLIPs stand for them.

    FoveateError for a processor without a chat template, a slow tokenizer, and a tokenizer without image token.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        template: Any = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.template: Any = template.get("default") if isinstance(template, dict) else template
        if not self.template:
            raise FoveateError("the processor has no chat template: set processor.chat_template, in a recipe model.chat_template")
        if not self.tokenizer.is_fast:
            raise FoveateError(f"{type(self.tokenizer).__name__} is a slow tokenizer, which cannot tell where in the text its tokens are")
        self.image_token: str = getattr(processor, "image_token", None) or MARKER
        self.videos = takes_videos(processor)
        self.video_token: str = getattr(processor, "video_token", None) or VIDEO
        self.image_token_id = int(self.tokenizer.convert_tokens_to_ids(self.image_token))
        if self.image_token_id == self.tokenizer.unk_token_id or self.image_token not in self.tokenizer.get_vocab():
            raise FoveateError(f"the tokenizer has no token {self.image_token!r}")
        # Lists of parts where the template takes them and makes of an image more than its token, such as tokens around it.
        image, text = {"type": "image"}, {"type": "text", "text": "probe"}
        listed, bare, written = (
            self._render([{"role": "user", "content": content}], tolerant=True)
            for content in ([image, text], [text], f"{self.image_token}\nprobe")
        )
        self.parts = "probe" in listed and "'text'" not in listed and listed != bare and listed.split() != written.split()
        self.end, self._appended_to = "", "every"
        self._mark = ""
        self._around: dict[tuple[str, ...], tuple[list[str], list[list[str]]] | None] = {}  # by the roles of a conversation's turns
        self.end_id: int | None = None
        self._find_end()

    def _find_end(self) -> None:
        """`_mark`, what the template writes after an answer up to its end token; `end` where that has to be put there."""
        probe = [("user", "question"), ("assistant", "answer")]
        try:
            tail = self._pieces(probe)[-1]
        except FoveateError:  # what is wrong is said where a conversation is written
            return
        # Not only special ones: Phi-3's <|end|> is an ordinary added token.
        added = [*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens]
        tokens = sorted((token for token in added if token.strip()), key=len, reverse=True)
        found = re.search("|".join(re.escape(token) for token in tokens), tail) if tokens else None
        if found is not None:
            self._mark, token = tail[: found.end()], found.group()
        else:
            eos = self.tokenizer.eos_token
            if not eos:
                return
            # A template that only writes it between turns is left to do so.
            if self._pieces([*probe, *probe])[1].startswith(eos):
                self._appended_to = "last"
            self._mark = token = self.end = str(eos)
        self.end_id = int(self.tokenizer.convert_tokens_to_ids(token))

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False, tolerant: bool = False, **options: Any) -> str:
        options = {"enable_thinking": False, **options}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:  # a template is a program of its own, it may raise anything
            if tolerant:
                return ""
            raise FoveateError(f"the chat template cannot write this conversation: {error}") from error
        return str(text)

    def messages(self, turns: Turns) -> list[dict[str, Any]]:
        """As templates want them: text with image tokens, or lists of parts where the template only takes those."""
        messages: list[dict[str, Any]] = []
        for number, (role, text) in enumerate(turns):
            if role == "assistant" and (self._appended_to == "every" or number == len(turns) - 1):
                text = text + self.end
            if not self.parts:
                messages.append({"role": role, "content": self._written(text)})
                continue
            content: list[dict[str, str]] = []
            for place, piece in enumerate(re.split(f"({MARKER}|{CLIP})", text)):
                if place % 2:
                    content.append({"type": "image" if piece == MARKER else "video"})
                    continue
                piece = piece.removeprefix("\n") if place else piece  # such templates write the line break after an image themselves
                if piece.strip():
                    content.append({"type": "text", "text": piece})
            messages.append({"role": role, "content": content})
        return messages

    def _written(self, text: str) -> str:
        return text.replace(MARKER, self.image_token).replace(CLIP, self.video_token)

    def ask(self, turns: Turns) -> str:
        """The prompt of a question that ends `turns`: as training writes what stands in front of an answer."""
        return self.prompt(self.messages(turns))

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """`ask` for messages as the template takes them. FoveateError where it refuses them."""
        before = self._render(messages, prompt=True)
        listed = any(isinstance(message["content"], list) for message in messages)
        sign = {"role": "assistant", "content": [{"type": "text", "text": _sign(0)}] if listed else _sign(0)}
        ahead, found, _ = self._render([*messages, sign], tolerant=True).partition(_sign(0))
        # A space in front of an answer is part of the answer's first token.
        return before if not found or ahead.rstrip() == before.rstrip() else ahead.rstrip(" ")

    def render(self, turns: Turns) -> tuple[str, Spans]:
        """The whole text, and the (start, end) of what is supervised of every answer.

        FoveateError for a conversation that the template refuses, where it drops or changes an answer, and if no token ends one."""
        messages = self.messages(turns)
        text = self._render(messages)
        numbers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        found = self._fitted(turns, numbers, text)
        if found is None:
            prompts = [self._render(messages[:number], prompt=True, tolerant=True) for number in numbers]
            found = self._around_answers(turns, text), prompts
        if self.end_id is None:
            raise FoveateError("the chat template writes no token behind an answer and the tokenizer has no eos_token: set one of them")
        spans = []
        for (start, end), before in zip(*found, strict=True):
            asked = before and text.startswith(before) and not text[len(before) : start].strip()
            first = len(before) if asked else len(text[:start].rstrip(" "))
            behind = text.startswith(self._mark, end)
            spans.append((first, end + len(self._mark) if behind else start + len(text[start:end].rstrip())))
        return text, spans

    def _fitted(self, turns: Turns, numbers: Sequence[int], text: str) -> tuple[Spans, list[str]] | None:
        """Where the answers, turns of these `numbers`, are in a text, and the prompts in front of them, by what the template writes around
        any turns of these roles. None where it does not fit this text, or the template takes lists of parts."""
        if self.parts:
            return None
        roles = tuple(role for role, _ in turns)
        if roles not in self._around:
            self._around[roles] = self._around_turns(roles, numbers)
        known = self._around[roles]
        if known is None:
            return None
        whole, before = known
        given = [self._written(content) for _, content in turns]
        for contents in (given, [content.strip() for content in given]):
            if _fill(whole, contents) == text:
                places = _places(whole, contents)
                prompts = [_fill(pieces, contents[:number]) for number, pieces in zip(numbers, before, strict=True)]
                return [places[number] for number in numbers], prompts
        return None

    def _around_turns(self, roles: Sequence[str], numbers: Sequence[int]) -> tuple[list[str], list[list[str]]] | None:
        """What the template writes around turns of these roles, in the whole text and in the prompt in front of each answer; None where it
        does not write each of them once and in order."""
        messages = self.messages([(role, _sign(number)) for number, role in enumerate(roles)])
        texts = [
            self._render(messages, tolerant=True),
            *(self._render(messages[:number], prompt=True, tolerant=True) for number in numbers),
        ]
        pieces = [_cut(text, count) for text, count in zip(texts, (len(roles), *numbers), strict=True)]
        found = [piece for piece in pieces if piece is not None]
        return (found[0], found[1:]) if len(found) == len(pieces) else None

    def _around_answers(self, turns: Turns, text: str) -> Spans:
        """Where each answer is in a text. What a template puts around answers does not depend on them, with few exceptions; whether that is
        so is seen by comparing."""
        answers, pieces = [content for role, content in turns if role == "assistant"], self._pieces(turns)
        for contents in (answers, [content.strip() for content in answers]):
            if _fill(pieces, contents) == text:
                return _places(pieces, contents)
        return self._search(turns, text)

    def tokenise(self, turns: Turns) -> Tokenised:
        """`render`'s text as tokens."""
        return self.encode(*self.render(turns))

    def encode(self, text: str, spans: Spans) -> Tokenised:
        """A text that the template has written as tokens; supervised are those that have a part in the spans.

        FoveateError where what is spelled (`foveate.data.spelled`) has no letters in the tokenizer."""
        special = not self.begins(text)
        if BEGIN not in text:
            return self._encode(text, spans, special)
        found, at = [], 0
        for number, part in enumerate(re.split(f"[{BEGIN}{END}]", text)):
            own = [(start - at, end - at) for start, end in spans]
            found.append(self._letters(part, own) if number % 2 else self._encode(part, own, special and not number))
            at += len(part) + 1
        ids, supervised = np.concatenate([one.ids for one in found]), np.concatenate([one.supervised for one in found])
        plain = text.replace(BEGIN, "").replace(END, "")
        if self._decoded(ids) != self._decoded(self._encode(plain, [], special).ids):
            words = ", ".join(repr(word[:40]) for word in re.findall(f"{BEGIN}([^{END}]*)", text)[:3])
            raise FoveateError(f"{type(self.tokenizer).__name__} cannot write {words} letter by letter: leave `spelled` out of the data")
        return Tokenised(ids, supervised)

    def _encode(self, text: str, spans: Spans, special: bool) -> Tokenised:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, truncation=False, padding=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            supervised |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        return Tokenised(ids, supervised)

    def _letters(self, text: str, spans: Spans) -> Tokenised:
        """Each character by itself, which may be several tokens, of bytes."""
        each = self.tokenizer(list(text), add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        inside = [any(start <= at < end for start, end in spans) for at in range(len(text))]
        return Tokenised(
            np.asarray([token for ids in each for token in ids], dtype=np.int32), np.repeat(inside, [len(ids) for ids in each])
        )

    def _decoded(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def begins(self, text: str) -> bool:
        """Whether the template has written the token that begins a sequence, so that the tokenizer must not write it again."""
        bos = self.tokenizer.bos_token
        return bool(bos and text.startswith(bos))

    def _pieces(self, turns: Turns, which: int | None = None) -> list[str]:
        """What the template writes around the answers of `turns`, or around one of them: before, between, after."""
        signed: list[tuple[str, str]] = []
        signs: list[str] = []
        for role, content in turns:
            if role == "assistant":
                signs.append(_sign(len(signs)))
                content = signs[-1] if which in (None, len(signs) - 1) else content
            signed.append((role, content))
        signs = signs if which is None else [signs[which]]
        rest, pieces = self._render(self.messages(signed)), []
        for place, sign in enumerate(signs):
            piece, found, rest = rest.partition(sign)
            if not found or sign in rest:
                count = "does not hold" if not found else "holds more than once"
                raise FoveateError(
                    f"the chat template rewrites earlier turns when later ones follow: its text {count} answer "
                    f"{(place if which is None else which) + 1} of {len(signs)}; use another chat_template"
                )
            pieces.append(piece)
        return [*pieces, rest]

    def _search(self, turns: Turns, text: str) -> Spans:
        """Where each answer stands in a text whose template looks into answers, trims them or drops the thoughts in them.

        One answer at a time is exchanged for a sign: what then is as before is not that answer. FoveateError if what is left is not of it.
        """
        answers = [(number, content) for number, (role, content) in enumerate(turns) if role == "assistant"]
        places = []
        for which, (number, content) in enumerate(answers):
            ahead, behind = self._pieces(turns, which)
            if not text.startswith(ahead):  # an empty thought stands where the answer brings its own
                ahead = self._render(self.messages(turns[:number]), prompt=True, tolerant=True, enable_thinking=True)
                ahead = ahead if ahead and text.startswith(ahead) else text
            start, end = len(ahead), len(text) - len(behind)
            left = "".join(text[start:end].split())
            if not text.endswith(behind) or not left or left not in "".join(content.split()):
                raise FoveateError(f"the chat template changes answer {which + 1} of {len(answers)}; use another chat_template")
            places.append((start, end))
        if any(end > start for (_, end), (start, _) in pairwise(places)):
            raise FoveateError("the chat template writes the answers in another order; use another chat_template")
        return places


def _sign(number: int) -> str:
    """A word of private characters, which no text holds."""
    return f"\ue000{number}\ue001"


def _cut(text: str, count: int) -> list[str] | None:
    """What is around the signs 0 to `count` - 1 in a text; None where they do not stand there in order, each once."""
    pieces, rest = [], text
    for number in range(count):
        piece, found, rest = rest.partition(_sign(number))
        if not found or _sign(number) in rest:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _fill(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def _places(pieces: Sequence[str], contents: Sequence[str]) -> Spans:
    places, at = [], 0
    for piece, content in zip(pieces, contents, strict=False):
        at += len(piece)
        places.append((at, at + len(content)))
        at += len(content)
    return places


def read_template(given: str) -> str:
    """The chat template that a recipe names: the text of a file, or the template itself. FoveateError if it is neither."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FoveateError(f"chat_template {given!r} is neither a template nor a file that can be read: {reason}") from None
