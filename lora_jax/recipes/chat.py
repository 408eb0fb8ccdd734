"""Conversations as text, and which of it the assistant wrote, turn by turn.

A template that marks the assistant's text by generation blocks says so itself. Of any other one, the text of the
messages before an answer, with the beginning of an answer (`add_generation_prompt`), has to be the beginning of the
whole text: there the answer begins. The text of the messages up to the answer has to be its beginning as well: there
it ends, after the special token that the model has to write to stop.

What comes after the last answer is left out, for nothing is learned of it.

Some templates write earlier turns in another way than the last one: without their reasoning, or without the token that
ends them. Of their conversations only the last answer is learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jax.core.errors import LoraError
from lora_jax.recipes.examples import Conversation, Message, Span

if TYPE_CHECKING:  # it takes jinja2, which only who writes conversations needs
    from lora_jax.recipes.templates import Template

ASSISTANT = ("assistant", "model")  # Gemma's own word for it; its template takes both


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: of all messages up to the last answer that is learned.
        answers: from where to where each of the answers that are learned reaches, in characters.
        last_only: what was found, where only the last answer is learned though there are others.
    """

    text: str
    answers: list[Span]
    last_only: str = ""


def render(conversation: Conversation, template: "Template", stops: Sequence[str] = ()) -> Rendered:
    """Write a conversation as text.

    Args:
        conversation: its messages.
        template: of the tokenizer.
        stops: special tokens; what a template writes after the one that ends an answer is not of the answer.

    Raises:
        LoraError: the template refuses the messages, leaves out an answer, or writes what stands before an answer in
            another way once the answer is there; no message is to be learned.

    >>> from datetime import datetime
    >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\\n{% endfor %}"
    >>> source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    >>> messages = ({"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."})
    >>> from lora_jax.recipes.templates import Template
    >>> found = render(Conversation(messages), Template(source, {}, datetime(2026, 1, 1)), ["</s>"])
    >>> [found.text[start:stop] for start, stop in found.answers]
    ['Hello.</s>']
    """
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
    learned = [i for i in turns if i >= conversation.context and messages[i].get("weight") != 0]
    if not learned:
        raise LoraError(f"none of its {len(messages)} messages is an answer of the assistant that is to be learned.")
    messages = messages[: learned[-1] + 1]  # of what comes after the last answer nothing is learned
    turns = [i for i in turns if i < len(messages)]
    text, blocks = template.render(messages, conversation.tools)
    if blocks:
        return Rendered(text, _marked(blocks, turns, learned))

    def beginning(upto: int, add_generation_prompt: bool = False) -> str:
        return template.render(messages[:upto], conversation.tools, add_generation_prompt)[0]

    try:
        spans = [_span(text, i, messages, beginning, stops) for i in learned]
    except _RewrittenError as problem:
        last = _span(text, learned[-1], messages, beginning, stops)
        return Rendered(text, [last], str(problem) if len(learned) > 1 else "")
    return Rendered(text, spans)


def prompt(conversation: Conversation, template: "Template") -> str:
    """Return the text of messages to which the model is to write the answer."""
    return template.render(conversation.messages, conversation.tools, add_generation_prompt=True)[0]


class _RewrittenError(LoraError):
    """The text of some messages is not the beginning of the text of all."""


def _span(
    text: str, turn: int, messages: Sequence[Message], beginning: Callable[..., str], stops: Sequence[str]
) -> Span:
    """Return from where to where the answer of one turn reaches."""
    try:
        before, upto = beginning(turn, True), beginning(turn + 1) if turn + 1 < len(messages) else text
    except LoraError as error:
        raise _RewrittenError(f"turn {turn + 1}: of the messages up to there alone, {error}") from None
    for part, end in ((before, "before it"), (upto, "up to it")):
        if not text.startswith(part):
            at = next(i for i, c in enumerate(part) if text[i : i + 1] != c)
            raise _RewrittenError(
                f"turn {turn + 1}: the chat template writes the messages {end} in another way once more follow: "
                f"{text[at : at + 30]!r} in place of {part[at : at + 30]!r}."
            )
    stop = _end_of_answer(text, len(before), len(upto), stops)
    if len(before) >= stop and messages[turn].get("content"):
        raise LoraError(f"turn {turn + 1}: the chat template leaves out this answer.")
    return len(before), stop


def _end_of_answer(text: str, start: int, stop: int, stops: Sequence[str]) -> int:
    """Return the end of the special token that ends an answer, if nothing but white space follows it."""
    length = len(text[start:stop].rstrip())
    return start + length if text[start : start + length].endswith(tuple(stops)) and length else stop


def _marked(blocks: Sequence[Span], turns: Sequence[int], learned: Sequence[int]) -> list[Span]:
    """Return the generation blocks of the turns that are learned."""
    if len(learned) == len(turns):
        return [*blocks]
    if len(blocks) != len(turns):
        raise LoraError(
            f"the chat template marks {len(blocks)} parts as the assistant's, and there are {len(turns)} turns of it, "
            f"of which {len(learned)} are to be learned: which parts these are cannot be said."
        )
    return [blocks[turns.index(i)] for i in learned]
