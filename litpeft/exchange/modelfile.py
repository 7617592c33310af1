"""A Modelfile, from which `ollama create` makes a model of a GGUF file: template, system message and stops.

Ollama's template is of one turn, and is repeated for the turns of a chat; only the first has a system message:

    (start){{ if .System }}(before){{ .System }}(after){{ end }}(question){{ .Prompt }}(answer){{ .Response }}(end)

The six texts are read off what the model's own template makes of a few chats. Where they do not give the same text for
other chats, TEMPLATE is left out.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from litpeft.data.templates import ChatTemplate, Message

NAME = "Modelfile"
S, U, A, V = "Sy5tem", "Qu3stion", "An5wer", "Fo11owing"  # words that no template has


@dataclass(frozen=True)
class Turn:
    """The fixed texts of a turn; `default` is the system message of a chat that has none.

    `lead` is space before an answer, which the model itself writes: Ollama keeps it in the answer.
    """

    start: str
    before: str | None  # None: the template knows no system message
    after: str
    question: str
    answer: str
    end: str
    lead: str
    default: str = ""

    def go(self) -> str:
        """Returns Ollama's template, in the language of Go."""
        system = f"{{{{ if .System }}}}{self.before}{{{{ .System }}}}{self.after}{{{{ end }}}}"
        system = "" if self.before is None else system
        return f"{self.start}{system}{self.question}{{{{ .Prompt }}}}{self.answer}{{{{ .Response }}}}{self.end}"

    def text(self, chat: list[Message]) -> str:
        """Returns what Ollama makes of a chat that ends with a question."""
        given = chat[0]["content"] if chat[0]["role"] == "system" else self.default
        system = "" if self.before is None or not given else f"{self.before}{given}{self.after}"
        said = ""
        for message in chat:
            if message["role"] == "user":
                said += f"{self.start}{system}{self.question}{message['content']}{self.answer}"
                system = ""
            elif message["role"] == "assistant":
                said += f"{self.lead}{message['content']}{self.end}"
        return said


def chat_of(*words: str, system: str | None = None) -> list[Message]:
    """Returns a chat of questions and answers in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[number % 2], "content": word} for number, word in enumerate(words)]


def rendered(template: ChatTemplate, chat: list[Message]) -> str | None:
    """Returns the prompt for the next answer, without the BOS that Ollama adds; None if the chat is refused."""
    try:
        text = template.render(chat, True)
    except ValueError:
        return None
    return text.removeprefix(template.tokenizer.bos or "") if template.tokenizer.adds_bos else text


def turn_of(template: ChatTemplate) -> Turn | None:
    """Returns the texts of the model's template; None if it is none of this kind."""
    plain, full = rendered(template, chat_of(U, A, V)), rendered(template, chat_of(U, A, V, system=S))
    if plain is None or not between(plain, U, A, V):
        return None
    first, answer, middle, last = between(plain, U, A, V)
    lead = answer.removeprefix(last)
    if lead.strip() or not answer.startswith(last):
        return None
    found = between(full or "", S, U)
    turns = []
    if found is not None:
        before, after, _ = found
        if before.startswith(first) and middle.endswith(first):  # the system message is a part of the question
            end = middle.removesuffix(first)
            turns.append(Turn(first, before.removeprefix(first), after, "", last, end, lead))
        shared = os.path.commonprefix((after[::-1], middle[::-1]))[::-1]
        if template.end_of_turn and template.end_of_turn in shared:
            shared = shared.rpartition(template.end_of_turn)[2].lstrip("\n")
        for question in (shared, first, ""):
            rest = first.removesuffix(question)
            after_system = after.removesuffix(question)
            default = rest[len(before) : len(rest) - len(after_system)] if rest.startswith(before) and rest else ""
            rest_of_middle = middle.removesuffix(question)
            for spoken in {default, ""}:  # the second: as it would be with a system message that is empty
                turns.append(Turn("", before, after_system, question, last, rest_of_middle, lead, spoken))
    if found is None and middle.endswith(first):
        turns.append(Turn("", None, "", first, last, middle.removesuffix(first), lead))
    chats = [chat_of("a"), chat_of("a b", "c\nd", "e"), chat_of("a", "b", "c", "d", "e f")]
    chats_with = [chat_of(*(message["content"] for message in chat), system="Be brief.") for chat in chats]
    for turn in turns:
        judged = chats + (chats_with if turn.before is not None else [])
        if all(turn.text(chat) == rendered(template, chat) for chat in judged):
            return turn
    return None


def between(text: str, *words: str) -> list[str] | None:
    """Returns what stands before, between and after words that a text has once, in this order; else None."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            return None
        part, _, text = text.partition(word)
        parts.append(part)
    return [*parts, text]


def write_modelfile(
    folder: Path,
    model: str,
    template: ChatTemplate,
    system: str | None,
    has_template: bool = True,
    adapter: str | None = None,
) -> str:
    """Writes the file; returns a line that says what it has."""
    turn = turn_of(template) if has_template else None
    lines, said = [f"FROM ./{model}"], ["stops"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    quoted = [] if turn is None else [("TEMPLATE", turn.go()), ("SYSTEM", system or turn.default)]
    if turn is None and system:
        quoted = [("SYSTEM", system)]
    for key, text in quoted:
        if text and '"""' not in text:
            lines.append(f'{key} """{text}"""')
            said.append(key.lower())
    names = template.tokenizer.backend.names
    lines += [f'PARAMETER stop "{names[number]}"' for number in template.stop_ids]
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    without = "; without TEMPLATE, since the model has none"
    if has_template:
        without = "; without TEMPLATE, which cannot say this chat template: Ollama takes the one in the GGUF file"
    return f"{NAME} for Ollama: {', '.join(said)}{'' if 'template' in said else without}"
