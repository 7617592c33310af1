"""Keys of a row or message that no format reads: refused if they change what is trained, else listed in the report."""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from litpeft.core.errors import counted, quoted, some
from litpeft.data.formats.turn import Turn

TOOLS = "only a list of messages may have tools, tool_calls and tool_call_id"
THOUGHTS = "only an answer of the assistant has thoughts"
SYSTEM = "call the key system"
CHANNEL = "give thoughts as reasoning_content and calls as tool_calls: the template writes their channels"
MEDIA = "only text is read"
PREFERENCE = "two answers are compared where the row has both chosen and rejected: see preference.loss"
VARIABLE = "the option template_options sets what the template reads, for all rows alike"
PARTS = "what is trained is a whole answer: a message may say train false"
TOLD = ("chat_template_kwargs", "enable_thinking")  # what a row tells the template
THINKING = ("reasoning_content", "reasoning", "thinking", "thoughts")  # names for what came before the answer
# Ignoring one of these would train on another text. key -> why it is not read, or what to do
REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), TOOLS),
    **dict.fromkeys(THINKING, THOUGHTS),
    **dict.fromkeys(("system_prompt", "system_message"), SYSTEM),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "attachments"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), PREFERENCE),
    **dict.fromkeys(("chat_template", "documents", *TOLD), VARIABLE),
    **dict.fromkeys(("channel", "recipient", "tool_plan"), CHANNEL),
    **dict.fromkeys(("loss_mask", "mask", "train_detail", "training_detail"), PARTS),
}
SWITCHES = ("train", "training", "trainable", "loss", "weight")  # names for: this answer is trained
UNWANTED = {"label": "completion", "kto_tag": ""}  # false: the answer is bad, where the row has the other key too
LEAST, MOST = 1e-6, 1000  # of a weight that is not 0; smaller ones could vanish in float32
ALLOWED = f"0, or a number from {LEAST:f} to {MOST}"
NOTHING = (None, "", [], {})  # values that data made from a table has where a row lacks the key


def refuse(
    record: dict[str, Any], place: str = "", more: dict[str, str] | None = None, known: Collection[str] = ()
) -> None:
    """Raises a ValueError that names a key of REFUSED or `more`, after `place`, that is not `known` to the format."""
    reasons = REFUSED | more if more else REFUSED
    for key in record:
        if key in reasons and key not in known and record[key] not in NOTHING:
            raise ValueError(f"{place}{key} is not supported: {reasons[key]}")
    for key, other in UNWANTED.items():
        if str(record.get(key)).lower() == "false" and (not other or other in record) and key not in known:
            raise ValueError(
                f"{place}{key} says that the answer is a bad one, and it would be learnt: leave the row out"
            )


def switch(record: dict[str, Any], place: str = "") -> float | None:
    """Returns the weight in the loss that a row or message asks for, 0 if it is not to be trained, None if it does not
    say; raises ValueError if that is unclear."""
    said: dict[str, float] = {}
    for key in SWITCHES:
        value = record.get(key)
        if value is not None and value != "":
            read, allowed = (weight_of, ALLOWED) if key == "weight" else (_flag, "true or false")
            said[key] = read(value)
            if said[key] is None:
                raise ValueError(f"{place}{key} must be {allowed}, got {quoted(value)}")
    if len({weight > 0 for weight in said.values()}) > 1:
        raise ValueError(f"{place}{' and '.join(said)} contradict each other")
    return said.get("weight", next(iter(said.values()), None))


def weight_of(value: Any) -> float | None:
    """Returns a weight in the loss, which a cell of a table holds as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        return None
    return weight if weight == 0 or LEAST <= weight <= MOST else None


def _flag(value: Any) -> float | None:
    """Returns what true or false means; a cell of a table holds them as text."""
    value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    return float(value) if isinstance(value, bool) else None


def thoughts(record: dict[str, Any], answer: str, place: str = "") -> str:
    """Returns what a row or message says was thought before its `answer`; raises ValueError if that is unclear."""
    given = [key for key in THINKING if record.get(key) not in NOTHING]
    if not given:
        return ""
    said, key = record[given[0]], f"{place}{given[0]}"
    if len(given) > 1 and any(record[other] != said for other in given):
        raise ValueError(f"{place}{' and '.join(given)} are two thoughts: keep one of them")
    if not isinstance(said, str):
        raise ValueError(f"{key} must be a string, got {type(said).__name__}")
    for text in (said, answer):
        if "</think>" in text:
            raise ValueError(f"{key} holds the thoughts, and {'it' if text is said else 'the answer'} has </think> too")
    return said


def told(record: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns what a row tells the chat template; raises ValueError if that is unclear."""
    said, switch_ = record.get(TOLD[0]), record.get(TOLD[1])
    if isinstance(said, str) and said:
        try:
            said = json.loads(said)  # from a cell of a table
        except ValueError as error:
            raise ValueError(f"{TOLD[0]} must be JSON: {error}") from None
    if not isinstance(said, dict) and said not in NOTHING:
        raise ValueError(f"{TOLD[0]} must be an object, got {quoted(said)}")
    found = {key: value for key, value in (said or {}).items() if value not in NOTHING}
    if switch_ is not None and not isinstance(switch_, bool):
        raise ValueError(f"{TOLD[1]} must be true or false, got {quoted(switch_)}")
    if switch_ is not None and found.get(TOLD[1], switch_) is not switch_:
        raise ValueError(f"{TOLD[1]} and {TOLD[0]} contradict each other")
    return tuple((found if switch_ is None else found | {TOLD[1]: switch_}).items())


def weighted(turns: list[Turn], record: dict[str, Any]) -> list[Turn]:
    """Returns the turns of a row, whose weight multiplies their own; raises ValueError for a row that is not trained.

    Only messages may be switched off.
    """
    weight = switch(record)
    if weight == 0:
        key = next(key for key in SWITCHES if record.get(key) not in NOTHING)
        raise ValueError(f"{key} says that the row is not to be trained: leave it out")
    return turns if weight in (None, 1) else [replace(turn, weight=weight * turn.weight) for turn in turns]


def unread(record: dict[str, Any], known: Collection[str], to_answer: bool) -> set[str]:
    """Returns the keys with a value that are neither `known` nor refused, nor switches of a row to learn."""
    switches = () if to_answer else SWITCHES
    return {key for key in record if record[key] is not None and key not in (*known, *switches) and key not in REFUSED}


def listed(counts: Counter[str]) -> str:
    """Returns keys with their number of rows, the most frequent first: `id (200 rows), source (3 rows)`."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    # keys come from outside: they are cut, and control characters are escaped
    return some([f"{repr(key[:40])[1:-1]} ({counted(n, 'row')})" for key, n in ordered])
