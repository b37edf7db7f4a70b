"""Texts to try a model on where the user brings none: prompts of several lengths, and a text that every Python has."""

import ast
import codecs
import importlib.util
from importlib.abc import InspectLoader

from autodeploy.errors import ConfigError

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    # returns the first n numbers as a list\n",
    (
        "Question: A train leaves at ten minutes past nine and arrives at a quarter to twelve. On the way "
        "it stands for five minutes in each of four stations. How long does it move?\nAnswer: Let us go "
        "through it step by step."
    ),
    (
        "The lighthouse had stood on the rock for longer than anybody in the village could say. Its "
        "keeper, a quiet man of about sixty, climbed the two hundred and eleven steps each evening, lit "
        "the lamp, and wrote three things into his book: the wind, the ships, and whatever he had thought "
        "about on the stairs. The wind came mostly from the west. The ships came from everywhere: coal "
        "from the north, oranges and salt from the south, once a whole circus with two camels on deck. "
        "What he thought about on the stairs was different every night. On the first of March he wrote "
        "that a spiral is a circle that has made up its mind. On the second he wrote nothing, because of "
        "the fog. On the third, in smaller letters than usual, he wrote down a question, and below it, on "
        "a line by itself, an answer that he crossed out again and replaced twice before the ink had "
        "dried. Years later, when the lamp had been made electric and the book lay under glass in the "
        "museum of the harbour, children who had learnt to read only that winter pressed their noses "
        "against the pane, spelled out the question aloud, and argued about"
    ),
)
"""from a few tokens to a few hundred"""

ZEN = "the Zen of Python, as in the standard library's module `this`"


def zen_of_python() -> str:
    """The text that `import this` prints, read without running the module.

    Raises:
        ConfigError: an installation of Python without sources.
    """
    found = importlib.util.find_spec("this")
    loader = found.loader if found is not None else None
    source = loader.get_source("this") if isinstance(loader, InspectLoader) else None
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return codecs.decode(node.value.value, "rot13")
    raise ConfigError("this Python has no source of its module `this`; give a text with --perplexity FILE")
