"""Keys of a row or a message that no format reads: refused where they say what is learnt, else named in the report."""

from collections import Counter
from collections.abc import Collection
from typing import Any

from litpeft.core.errors import quoted, some

TOOLS = "calls of tools are not trained"
THOUGHTS = "write the thoughts into the answer's text, as the model's template writes them"
SYSTEM = "call the key system"
MEDIA = "only text is read"
PREFERENCE = "answers are learnt, not preferences: keep the answer that is right"
VARIABLE = "templates are rendered without variables of a row"
PARTS = "what is trained is a whole answer: a message may say train false"
# Leaving one of these away would teach another text. key: why it is not read, or what to do
REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts"), THOUGHTS),
    **dict.fromkeys(("system_prompt", "system_message"), SYSTEM),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), PREFERENCE),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking", "documents"), VARIABLE),
    **dict.fromkeys(("loss_mask", "mask", "train_detail", "training_detail"), PARTS),
}
SWITCHES = ("train", "training", "trainable", "loss", "weight")  # they all say whether an answer is trained
NOTHING = (None, "", [], {})  # what a table with a column for the key writes where a row does not have it


def refuse(record: dict[str, Any], place: str = "", more: dict[str, str] | None = None) -> None:
    """Raises ValueError naming a key that would be lost, one of REFUSED and `more`; `place` goes before its name."""
    reasons = REFUSED | more if more else REFUSED
    for key in record:
        if key in reasons and record[key] not in NOTHING:
            raise ValueError(f"{place}{key} is not supported: {reasons[key]}")


def switch(record: dict[str, Any], place: str = "") -> bool | None:
    """Returns what a row or message says of being trained, or None; raises ValueError where that is not clear."""
    said: dict[str, bool] = {}
    for key in SWITCHES:
        value = record.get(key)
        if value is None:
            continue
        if value not in (0, 1) or isinstance(value, bool) == (key == "weight"):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise ValueError(f"{place}{key} must be {allowed}, got {quoted(value)}")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise ValueError(f"{place}{' and '.join(said)} contradict each other")
    return next(iter(said.values()), None)


def refuse_switched_off(record: dict[str, Any]) -> None:
    """Raises ValueError for a row that is not to be trained: its messages may say so, or it should not be there."""
    if switch(record) is False:
        key = next(key for key in SWITCHES if record.get(key) is not None)
        raise ValueError(f"{key} says that the row is not to be trained: leave it out")


def unread(record: dict[str, Any], known: Collection[str]) -> set[str]:
    """Returns the keys that are neither `known` to the format nor read, or refused, everywhere."""
    return {key for key in record if key not in known and key not in REFUSED and key not in SWITCHES}


def told(counts: Counter[str]) -> str:
    """Returns keys with the number of their rows as text: `id (200 rows), source (3 rows)`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    # a key is somebody's text: it is cut, and what would steer a terminal is spelled out
    return some([f"{repr(key[:40])[1:-1]} ({n:,} {'row' if n == 1 else 'rows'})" for key, n in ordered])
