"""A chat as ShareGPT's files have it: other words for messages, role and content.

{"conversations": [{"from": "human", "value": "Capital of France?"}, {"from": "gpt", "value": "Paris."}],
 "system": "Be brief."}

The text of a `function_call` is the JSON of a call, {"name": ..., "arguments": {...}}, and trained; the one of an
`observation` is what the tool answered.
"""

from litpeft.data.formats.chat import CALL, Chat

ROLES = {"human": "user", "gpt": "assistant", "system": "system", CALL: "assistant", "observation": "tool"}
FORMAT = Chat("conversations", "from", "value", ROLES | {name: name for name in ("user", "assistant", "tool")})
