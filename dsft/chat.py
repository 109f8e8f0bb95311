"""python -m dsft.chat RUN [RUN2 ...]: talk to what was trained, the base and every result side by side."""

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from dsft_launchers.shown import in_a_line, say, shown

from dsft.entry import collect_again, enter
from dsft.learned import FLAG
from dsft.owners import TRUST
from dsft.results import BASE, Result, find
from dsft.wording import refuse, suggest

if TYPE_CHECKING:
    from dsft.adapters import Adapters

USAGE = f"dsft chat RUN [RUN2 ...] [--prompt TEXT] [--max-new-tokens N] [--temperature T] [{TRUST}] [{FLAG}]"
INTERRUPTED = 130
"""Exit code as a shell's: 128 + SIGINT."""
COMMANDS = "/list  /use NAME|all|base  /reset  /quit"


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one prompt, or all that is typed; 2 if there is nothing to talk to."""
    parser = argparse.ArgumentParser(prog="dsft chat", usage=USAGE, description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, or of adapters (PEFT's or dsft's), of one base model")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument(TRUST, action="store_true", help="read a folder that other users may have written")
    parser.add_argument(FLAG, action="store_true", help="let the code of the base model run, which it brings itself")
    parser.error = _raise  # type: ignore[method-assign]
    try:
        args = parser.parse_args(argv)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, got {args.temperature}")
        if args.prompt is not None:
            if not args.prompt.strip():
                raise ValueError("--prompt must hold some text, got none; leave it out to type")
            _check_text("--prompt", args.prompt)
        code = args.trust_remote_code
        results = find(args.runs, trust=args.trust, trust_remote_code=code)
        chat = Chat(results, args.max_new_tokens, args.temperature, trust_remote_code=code)
        if args.prompt is not None:
            chat.ask(args.prompt)
            return 0
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    chat.talk()
    return 0


def _check_text(what: str, text: str) -> None:
    """Refuse bytes that are no text, which Python hands on as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be text in UTF-8, got {text[:40]!a}; convert it, e.g. by iconv") from error


def _raise(message: str) -> NoReturn:
    raise ValueError(f"{message}; usage: {USAGE}")


@dataclass
class Speaker:
    """One who answers. name: None for the base; said: the conversation so far."""

    shown: str
    adapters: "Adapters"
    name: str | None
    said: list[dict[str, str]] = field(default_factory=list)


class Chat:
    """The base and the results, each with a conversation of its own; listening: those who answer."""

    def __init__(
        self, results: Sequence[Result], max_new_tokens: int, temperature: float, *, trust_remote_code: bool = False
    ) -> None:
        from dsft.adapters import Adapters, by_base

        collect_again()
        self.how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.speakers: list[Speaker] = []
        groups = by_base(results)
        for group in groups:
            adapters = Adapters(group, trust_remote_code=trust_remote_code)
            # results that saw the base packed or computed in another way have a base of their own
            base = BASE if len(groups) == 1 else f"{BASE} of {', '.join(adapters.names())}"
            self.speakers.append(Speaker(base, adapters, None))
            self.speakers += [Speaker(name, adapters, name) for name in adapters.names()]
        self.listening = list(self.speakers)

    def talk(self) -> None:
        """Answer what is typed, until /quit or the end of the input."""
        typed = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, and the next one read
        if typed:
            print(in_a_line(f"{', '.join(speaker.shown for speaker in self.listening)} listen. {COMMANDS}"))
        for line in _lines(typed):
            if line == "/quit":
                return
            try:
                _check_text("a line", line)
                if line.startswith("/"):
                    self._obey(*line[1:].partition(" ")[::2])
                else:
                    self.ask(line)
            except KeyboardInterrupt:  # this answer is enough
                print()
            except ValueError as error:
                say(f"dsft: {error}")

    def ask(self, prompt: str) -> None:
        """Print each answer under the name of who gave it, once the conversation fits all of them."""
        streamed, saying = sys.stdout.isatty(), {"role": "user", "content": prompt}
        for speaker in self.listening:
            speaker.adapters.switch(speaker.name)
            speaker.adapters.check([*speaker.said, saying])
        for speaker in self.listening:
            print(in_a_line(f"{speaker.shown}:"), flush=True)
            speaker.adapters.switch(speaker.name)
            asked = [*speaker.said, saying]
            streamer = _streamer(speaker.adapters.tokenizer) if streamed else None
            answer = speaker.adapters.answer(asked, streamer=streamer, **self.how)
            speaker.said = [*asked, {"role": "assistant", "content": answer}]
            print("" if streamed else f"{shown(answer)}\n", flush=True)

    def _obey(self, command: str, word: str) -> None:
        word = word.strip()
        if command == "list":
            for speaker in self.speakers:
                print(in_a_line(f"{'*' if speaker in self.listening else ' '} {speaker.shown}"))
        elif command == "use":
            self.listening = self._named(word)
        elif command == "reset":
            for speaker in self.speakers:
                speaker.said = []
        else:
            raise ValueError(f"/{command} is no command; there are: {COMMANDS}")

    def _named(self, word: str) -> list[Speaker]:
        """Whom word means: all, the bases, or one by name."""
        if word == "all":
            return list(self.speakers)
        found = [speaker for speaker in self.speakers if (BASE if speaker.name is None else speaker.shown) == word]
        if not found:
            names = [speaker.shown for speaker in self.speakers if speaker.name is not None]
            raise ValueError(f"/use {word or '(nothing)'}: nobody is called so{suggest(word, [*names, BASE, 'all'])}")
        return found


def _lines(typed: bool) -> Iterator[str]:
    """What is typed, line by line, blank ones left out; Ctrl-D ends it, Ctrl-C forgets a line."""
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(shown(text), stream_end=stream_end)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    enter(main)
