"""A chat as ShareGPT's files have it: other words for messages, role and content.

{"conversations": [{"from": "human", "value": "Capital of France?"}, {"from": "gpt", "value": "Paris."}],
 "system": "Be brief."}

The text of a `function_call` is the JSON of a call, {"name": ..., "arguments": {...}}, and trained; the one of an
`observation` is what the tool answered.
"""

from litpeft.data.formats.chat import SHARED_ROLES, Chat

FORMAT = Chat("conversations", "from", "value", SHARED_ROLES)
