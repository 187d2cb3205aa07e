"""gptme's own patch tool: (patch, content) pairs as JSON on standard input; the new content or null for each."""

import json
import sys

from gptme.tools.patch import apply

if __name__ == "__main__":
    answers = []
    for patch, content in json.load(sys.stdin):
        try:
            answers.append(apply(patch, content))
        except ValueError:
            answers.append(None)
    sys.stdout.write("\n" + json.dumps(answers) + "\n")
