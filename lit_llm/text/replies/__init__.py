"""What a model generates, taken apart: reasoning, content and tool calls; and the grammars of tool calls."""
