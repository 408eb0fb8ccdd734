"""Chat templates: programs in Jinja that come with a tokenizer and write a conversation as text.

A template is a stranger's program, so it runs in Jinja's sandbox, with the functions that templates are written for and
no others. Those that say themselves what the assistant wrote do so by `{% generation %}` blocks.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from lora_jax.core.errors import LoraError
from lora_jax.recipes.examples import Span

try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
except ImportError as error:
    raise LoraError("chat templates need jinja2, which is not installed: pip install 'lora_jax[recipes]'") from error

# Where a generation block begins and ends, while the text is made. Unicode assigns no characters to these numbers.
BEGIN, END = "\ufdd0", "\ufdd1"


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, with a mark at each end."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


@dataclass(frozen=True)
class Template:
    """A chat template.

    Args:
        source: what is written in Jinja.
        variables: further ones that it may use, such as `bos_token`.
        now: what `strftime_now` formats; some templates begin with the date of today.
    """

    source: str
    variables: Mapping[str, str]
    now: datetime

    @functools.cached_property
    def _compiled(self) -> Any:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: self.now.strftime(form)}
        return environment.from_string(self.source)

    def check(self) -> None:
        """Check that it can be read, whatever the messages are.

        Raises:
            LoraError: it is no Jinja.
        """
        try:
            self._compiled  # noqa: B018 (made once, here)
        except jinja2.TemplateSyntaxError as error:
            raise LoraError(
                f"the chat template of the model's folder is no Jinja, in its line {error.lineno}: {error.message}."
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text, and from where to where its generation blocks reach.

        Raises:
            LoraError: the template has a mistake, or raises for these messages.

        >>> source = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}"
        >>> source += "{% endfor %}"
        >>> Template(source, {}, datetime(2026, 1, 1)).render([{"role": "user", "content": "Hi!"}])
        ('[user]Hi!', [(6, 9)])
        """
        self.check()
        try:
            text = self._compiled.render(
                **self.variables,
                messages=[*messages],
                tools=[*tools] or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise LoraError(f"the chat template refuses it: {str(error)[:300]}") from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            message = f"the chat template fails for it: {type(error).__name__}: {str(error)[:300]}"
            raise LoraError(message) from None
        return _without_marks(text)


def _without_marks(text: str) -> tuple[str, list[Span]]:
    parts, spans, done = [], list[Span](), 0
    for i, part in enumerate(text.split(BEGIN)):
        inside, end, after = part.partition(END)
        if bool(end) != bool(i) or END in after:
            raise LoraError(
                "the chat template has generation blocks inside of others, or the messages have the characters U+FDD0 "
                "and U+FDD1, which mark such blocks and stand for no text."
            )
        if i:
            spans.append((done, done + len(inside)))
        parts += [inside, after]
        done += len(inside) + len(after)
    return "".join(parts), spans


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as it is: jinja2's own filter escapes the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
