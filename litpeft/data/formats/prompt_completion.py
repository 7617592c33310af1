"""One prompt and its completion: texts, or lists of messages of which those of the completion are trained.

{"prompt": "Capital of France?", "completion": "Paris."}
"""

from litpeft.data.formats.pair import ANSWERS, Pair

FORMAT = Pair("prompt", ("completion", *(key for key in ANSWERS if key != "completion")))
