"""The sentences of gptme's system prompt of which the short form is made, and its tools (gptme 0.35.1, prompts/templates.py; MIT).

Of the full prompt only digests stand here: it is recognised, never written.
"""

VERSION = "0.35.1"
# The tools that gptme brings along. Of any other tool (plugin, MCP server), the text does not tell where its examples begin.
OWN_TOOLS = {
    *("append", "autocommit", "autocompact", "browser", "chats", "choice", "clarify", "complete", "computer", "convert", "elicit"),
    *(
        "form",
        "gh",
        "hashline_edit",
        "ipython",
        "lessons",
        "mcp",
        "memory",
        "morph",
        "patch",
        "patch_many",
        "precommit",
        "progress",
    ),
    *("rag", "read", "recall", "request_tool_change", "restart", "save", "screenshot", "shell", "subagent", "tmux", "todo"),
    *("vent", "vision", "watch"),
}
WITH_EXAMPLES = {"append", "ipython", "patch", "save", "shell", "tmux", "todo"}  # that show calls, in every format
WITH_BLOCK = {"append", "memory", "save"}  # that name their code block, in the markdown format only

# Of the full prompt: SHA-256 (first 16 digits) of what stands between its first line and the paragraph on interaction
# -> which edit tools it speaks of, and whether it asks for <thinking> tags (models that do not reason by themselves).
FULL_BASES = {
    "3981312490d0fd75": ("patch save", True),
    "74e95905023cae03": ("patch save", False),
    "629a1ce32d287f1a": ("patch", True),
    "accfed2cede55645": ("patch", False),
    "cd71bdfa7d098b4d": ("save", True),
    "9be10068727a9723": ("save", False),
    "f0e94b4945f34593": ("", True),
    "ed584827340e6de5": ("", False),
}
_PRESERVE = "Preserve comments, unless they are no longer relevant."
EDITING = {
    "patch save": f"When suggesting code changes, prefer applying patches over examples. {_PRESERVE}\n"
    "Use the patch tool to edit existing files, or the save tool to overwrite.",
    "patch": f"When suggesting code changes, prefer applying patches over examples. {_PRESERVE}\n"
    "Use the patch tool to edit existing files.",
    "save": f"When suggesting code changes, use the save tool to write or overwrite files. {_PRESERVE}",
    "": f"When suggesting code changes, show the changes clearly in your response. {_PRESERVE}",
}
INTERACTIVE = """You are in interactive mode. The user is available to provide feedback.
You should show the user how you can use your tools to write code, interact with the terminal, and access the internet.
The user can execute the suggested commands so that you see their output.
If the user aborted or interrupted an operation don't try it again, ask for clarification instead.
If clarification is needed, ask the user."""
ALONE = """You are in non-interactive mode. The user is not available to provide feedback.
All code blocks you suggest will be automatically executed.
Do not provide examples or ask for permission before running commands.
Proceed directly with the most appropriate actions to complete the task."""
FULL_ENDING = """End your response with a concrete next step: a command to run, a file to change, or a specific action to take.
Do not end with an offer to elaborate ("I can give you a patch if you want") or a generic suggestion."""
FULL_QUESTION = """
Ask a clarifying question only when the request is genuinely ambiguous and you cannot proceed without the answer."""
SHORT_ENDING = "End with a concrete next step (a command or specific action), not an offer to elaborate."
SHORT_QUESTION = " Ask a clarifying question only when the request is genuinely ambiguous."
CALL_AT_ONCE = """

When a tool is available for a task, call it immediately — do not describe what you would do or which tool you would use. \
Every decision to use a tool must produce an actual tool call in the same message."""  # for models that only talk about tools


def short_base(editing: str, thinking: bool) -> str:
    """What stands between the first line and the paragraph on interaction in the short prompt."""
    lines = (
        "You help users with programming tasks by reading code, running terminal commands, and editing files on the local machine.",
        "Think step by step in `<thinking>` tags." if thinking else "",
        f"Gather context before acting. {EDITING[editing]}",
        "Use absolute paths and `pwd` when needed.",
        "Do not use unset placeholders like `$REPO`.",
        "Do not suggest opening a browser or editor when available tools can do it.",
        "Use available tools proactively instead of suggesting manual actions.",
        "Be concise and thorough.",
        "Use `<thinking>` tags to think before you answer." if thinking else "",
    )
    return "\n".join(lines).rstrip()
