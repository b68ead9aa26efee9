"""Tool calls and reasoning in a model's text: formats of several families, one small file each.

:func:`detect` finds a model's format. Its parser turns text into deltas while it comes. Its grammar makes calls come
where they must.
"""

from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.delta import Arguments, Content, Delta, Reasoning, ToolCall, call_id, joined
from tulle.text.tool_formats.detection import detect
from tulle.text.tool_formats.generic import describe_tools
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.tools import Choice, Tool, read_tools

__all__ = [
    "Arguments",
    "Choice",
    "Content",
    "Delta",
    "Parser",
    "Reasoning",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "call_id",
    "describe_tools",
    "detect",
    "joined",
    "read_tools",
]
