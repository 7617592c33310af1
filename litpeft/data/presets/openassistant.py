"""OpenAssistant (OASST1): chats written by volunteers, as trees of messages. https://arxiv.org/abs/2304.07327

A row is a message, with the id of the one it answers. Of each tree one chat is learned: from its prompt, at every
message the reply that people ranked best, as far as the last answer of the assistant.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from litpeft.data.presets.preset import Preset
from litpeft.data.readers.record import Record

ROLES = {"prompter": "user", "assistant": "assistant"}
NEEDED = {"message_id", "parent_id", "text", "role"}


def rows(records: Iterator[Record]) -> Iterator[Record]:
    """Yields a chat for each tree of messages, in the order of their prompts; a tree without an answer has none."""
    prompts: list[Record] = []
    replies: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        message = record.value
        if record.problem or not isinstance(message, dict) or not message.keys() >= NEEDED:
            lacks = "" if record.problem else f"it lacks one of {', '.join(sorted(NEEDED))}"
            yield Record(record.where, message, record.problem or lacks)
        elif usable(message):
            (replies[message["parent_id"]] if message["parent_id"] else prompts).append(record)
    for prompt in prompts:
        chat = best_chat(prompt, replies)
        if chat:
            facts = {"message_id": prompt.value["message_id"], "lang": prompt.value.get("lang")}
            yield Record(prompt.where, {"messages": [said(one) for one in chat]} | facts)


def best_chat(prompt: Record, replies: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """Returns the messages of a tree along its best replies, up to the last of the assistant."""
    chat, following = [], [prompt]
    while following:
        best = min(following, key=lambda record: rank(record.value))  # the first, where none is ranked
        chat.append(best.value)
        following = replies.get(best.value["message_id"], [])
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    return chat


def usable(message: dict[str, Any]) -> bool:
    """Returns whether a message was not deleted, nor turned down by its reviewers."""
    return not message.get("deleted") and message.get("review_result") is not False


def rank(message: dict[str, Any]) -> float:
    """Returns the place of a reply among its siblings: 0 is the best; one that nobody ranked comes last."""
    return float("inf") if message.get("rank") is None else message["rank"]


def said(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": ROLES.get(message["role"], message["role"]), "content": message["text"]}


PRESET = Preset(
    source="hf://OpenAssistant/oasst1",
    licence="Apache 2.0",
    about="9,800 chats by volunteers, in 35 languages: the best replies of each tree",
    row={"message_id": "...", "parent_id": None, "text": "...", "role": "prompter", "lang": "en", "rank": None},
    rows=rows,
)
