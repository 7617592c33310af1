"""Prints what pytest found of the formats, from its --junitxml file, as a table: family x direction.

A cell counts tests that passed, `FAILED 1 of 3`, or `skipped 2` where none ran. The exit code is 1 if a test failed.
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from litpeft.model.families import FAMILIES

# part of a test's file and name -> direction; the first that fits
DIRECTIONS = {
    "test_config_keys": "keys of config.json",
    "test_packed_files": "from 4-bit folders",
    "test_gpt.": "from HF folder",
    "test_long_texts": "from HF folder",
    "test_names": "from HF folder",
    "test_text_model": "from HF folder",
    "an_adapter_of_peft_on_a_family": "from peft",
    "test_peft_families": "to peft",
    "test_peft_experts": "to peft",
    "test_hf_out": "to HF folder",
    "test_generation_config": "to HF folder",
    "test_peft_out": "to peft",
    "test_peft_in": "from peft",
    "test_convert_bin": "from .bin",
    "test_convert_meta": "from Meta's .pth",
    "test_convert": "from GGUF",
    "test_gguf_in": "from GGUF",
    "transformers_reads": "GGUF to transformers",
    "test_gguf_out": "GGUF to llama.cpp",
    "test_gguf_tokenizers": "GGUF to llama.cpp",
    "test_gguf_experts": "adapter to llama.cpp",
    "llama_cpp_computes_with_the_adapter": "adapter to llama.cpp",
    "mlx": "adapter to mlx-lm",
    "test_adapters_out": "refused, or checked",
    "test_gguf_families": "refused, or checked",
    "test_gguf_tokenizer_names": "GGUF to llama.cpp",
    "test_push": "to the hub",
}
# in the names of tests, and of their parameters
OTHER_NAMES = {
    "neox": "gpt_neox",
    "smollm2": "llama",
    "gemma3": "gemma3_text",
    "gemma_4": "gemma4_text",
    "mxfp4": "gpt_oss",
    "gpt-4o": "gpt_oss",
    "tekken": "ministral3",
    "deepseek-v3": "deepseek_v3",
    "deepseek-llm": "deepseek_v2",
}


def family_of(test: str) -> str:
    """Returns the family that a test's parameters name, or its own name; the longest if several are; else llama."""
    function, _, parameters = test.partition("[")
    for text in (parameters, function.rpartition(".")[2]):
        for short, name in OTHER_NAMES.items():
            text = text if name in text else text.replace(short, name)  # noqa: PLW2901
        found = sorted((name for name in FAMILIES if name in text), key=len)
        if found:
            return found[-1]
    return "llama"


def direction_of(test: str) -> str | None:
    return next((direction for part, direction in DIRECTIONS.items() if part in test), None)


def cell(results: list[str]) -> str:
    """Returns what a cell shows of the results of its tests."""
    failed, skipped = results.count("failed"), results.count("skipped")
    if failed:
        return f"FAILED {failed} of {len(results)}"
    return f"skipped {skipped}" if skipped == len(results) else str(len(results) - skipped)


def table(path: Path) -> tuple[str, bool]:
    """Returns the table as text, and whether all is well."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):
        test = f"{case.get('classname')}.{case.get('name')}"
        direction = direction_of(test)
        if direction is not None:
            kinds = {child.tag for child in case}
            result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            cells[family_of(test), direction].append(result)
    columns = [direction for direction in dict.fromkeys(DIRECTIONS.values()) if any(direction == d for _, d in cells)]
    rows = [name for name in FAMILIES if any(name == family for family, _ in cells)]
    lines = [["family", *columns]]
    lines += [
        [row, *(cell(cells[row, column]) if (row, column) in cells else "-" for column in columns)] for row in rows
    ]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    text = "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    results = [result for found in cells.values() for result in found]
    return text, bool(results) and "failed" not in results


if __name__ == "__main__":
    text, well = table(Path(sys.argv[1]))
    print(text)
    print("\n-: litpeft refuses it for this family, or it is tried with another one for all, mostly with llama")
    sys.exit(not well)
