"""A chat of any number of turns. The list of messages alone is a row, too.

{"messages": [{"role": "system", "content": "Be brief."},
              {"role": "user", "content": "Capital of France?"},
              {"role": "assistant", "content": "Paris."},
              {"role": "user", "content": "And of Peru?"},
              {"role": "assistant", "content": "Lima.", "train": false}]}

Every turn of the assistant is trained, except where it says `"train": false`, `"loss": false` or `"weight": 0`. Another
`weight` multiplies the loss of its tokens; one beside the messages that of the whole row.
What the assistant thought before it answered is `reasoning_content` (or `thinking`, `reasoning`, `thoughts`) of its
message, or stands in the content: "<think>...</think>Paris."
A system message may also stand beside the messages, and so may tools: {"tools": [...], "messages": [...]}.
"""

from litpeft.data.formats.chat import Chat

FORMAT = Chat("messages", "role", "content")
