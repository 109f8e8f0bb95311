"""A tokenizer's chat template: what it reads, what it renders, and where in the text it renders each message."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsft.data.marks import KEY, CannotRenderError, Traced, read_marks, with_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


class ChatTemplate:
    """One template of a tokenizer. day: the date that a template is told that asks for it.

    Raises ValueError, one line, if jinja cannot read it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str, day: date) -> None:
        self.tokenizer = tokenizer
        self.environment = _environment()
        try:
            tree = self.environment.parse(source)
            self.reads = find_undeclared_variables(tree)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"model must have a chat template that jinja can read, got an error in its line {error.lineno}: "
                f"{one_line(error)}; correct the template (chat_template.jinja or tokenizer_config.json)"
            ) from None
        self.marks_itself = any(True for _ in tree.find_all(nodes.Scope))  # of _Generation: no other tag makes one
        self.source = _dated(tree, day) + source if self.reads_date else source
        self._marked: str | None = None

    @property
    def reads_date(self) -> bool:
        """True if the template asks for the date."""
        return "strftime_now" in self.reads

    @property
    def reads_tools(self) -> bool:
        """True if the template does something with a row's tools."""
        return "tools" in self.reads

    def apply(self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: Any) -> Any:
        """What transformers' apply_chat_template gives, on the template's day. Raises CannotRenderError."""
        given = {"chat_template": self.source, **options}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=list(tools) if tools else None, **given
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may fail on a row with whatever Python raises
            raise CannotRenderError(one_line(error)) from error

    def text(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        """The messages as text, with the generation prompt behind them if prompt. Raises CannotRenderError."""
        return str(self.apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def trace(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False) -> Traced:
        """The text, and where each message stands in it. Raises CannotRenderError if that cannot be told.

        Messages keep what they say, so a template that strips, splits or drops it does so with the marks too; and the
        marked text counts only if it is, without the marks, the text.
        """
        if self._marked is None:
            self._marked = with_marks(self.environment, self.source)
        numbered = [{**message, KEY: str(index)} for index, message in enumerate(messages)]
        options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": self._marked}
        traced = read_marks(str(self.apply(numbered, tools, **options)))
        if traced.text != self.text(messages, tools, prompt=prompt):
            raise CannotRenderError("it writes something else where its loops are watched")
        return traced


def one_line(error: Exception) -> str:
    """The first line of what an error says, after its name where it is not the template's own refusal."""
    said = (str(error).strip() or "nothing said").splitlines()[0]
    said = said if said.endswith("..") else said.removesuffix(".")
    return said if isinstance(error, TemplateError) and str(error).strip() else f"{type(error).__name__}: {said}"


class _Generation(Extension):
    """{% generation %}: no more than its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """An environment that reads chat templates as transformers' does; it renders none."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )


def _dated(tree: nodes.Template, day: date) -> str:
    """A macro strftime_now that knows one day, for the head of a template: transformers takes no function from outside.

    It answers in the forms that the template has in its text.
    """
    forms = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str) and "%" in node.value}
    known = json.dumps({form: day.strftime(form) for form in sorted(forms)})
    unknown = "raise_exception('it asks for the date in a form that is not in its text')"
    return (
        f"{{%+ macro strftime_now(format) +%}}{{%+ set known = {known} +%}}"
        f"{{{{ known[format] if format in known else {unknown} }}}}{{%+ endmacro %}}\n"
    )
