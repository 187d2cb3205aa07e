"""Is a conversation about programming, the shell or developer tools?

It is where code stands in a fence, or where the first message uses words of the trade: one that means nothing else, or two
that have another meaning too. Tables, drawings and verse in a fence are no code. The words come from general knowledge.

Measured by benchmarks/relevance.py on the hand-made labels for 92 English trees of oasst1 (12 relevant; 6 borderline ones left
out): precision 0.83 (10 of 12; 95 % between 0.55 and 0.95), recall 0.83 (10 of 12; the same interval). A small sample, of one
person's judgement, in English only: it says that the rule is of use, not how well it does on all of OpenAssistant.
"""

import re
from collections.abc import Sequence

from mlx_finetune.data.conversation import Message

LONGEST_PROMPT = 20_000  # characters of the first message that are looked at

_ALONE = r"""
    (?<!monty\ )python[23]? numpy pytorch tensorflow django fastapi pytest pip\ install conda jupyter pandas\ dataframe\w*
    javascript typescript node\.?js npm react\.?js react\ native vue\.?js angular\.?js next\.?js express\.?js jquery webpack
    java(?!\ (?:island|sea|coffee|man)) kotlin scala\ code clojure haskell ocaml erlang golang rust\ (?:code|crate|program)\w*
    c\+\+ c\# f\# (?:asp)?\.net objective-c swiftui xcode php perl matlab fortran cobol lua\ (?:script|code) vba vb\.net
    verilog vhdl solidity webassembly wasm autohotkey powershell ruby\ on\ rails
    (?:my|postgre|no|pl/)?sql sqlite3? postgres mongodb redis graphql html5? css3? json yaml toml xml regex(?:es|p)?
    regular\ expressions? bash zsh fish\ shell (?:unix|linux|shell)\ (?:script|command|prompt)\w* command[\ -]?line cli awk
    grep chmod crontab cron\ jobs? ssh sudo systemd vim neovim emacs vs\ ?code visual\ studio intellij tmux linux ubuntu debian
    nixos git github gitlab bitbucket pull\ requests? docker(?:file)? kubernetes kubectl terraform nginx ci/cd devops
    cuda opengl vulkan llvm gcc makefiles? cmake compilers? assembly\ (?:language|code) x86(?:[-_]64)?
    apis? sdks? http\ (?:request|server|status)\w* localhost tcp/ip websockets? oauth2? web\ ?servers? microservices?
    source\ code pseudo-?code codebase code\ (?:review|snippet|example|sample|editor)s? (?:lines?|piece|block)\ of\ code
    hello\ world (?:how|learn|learning)\ to\ (?:program|code) markdown restructuredtext coding programm?ing(?!\ schedule)
    programmers? software\ (?:engineer|develop|architect)\w* web\ develop\w* (?:browser|chrome|firefox)\ (?:extension|add-?on)s?
    web\ ?scrap(?:er|ing)s? front[\ -]?end back[\ -]?end full[\ -]?stack debug(?:ger|ging)? refactor(?:ing)? stack\ trace traceback
    segfaults? segmentation\ fault unit\ tests? null\ pointer\w* data\ structures? linked\ lists? hash\ ?(?:maps?|tables?)
    binary\ (?:search|trees?) (?:bubble|quick|merge)[\ -]?sort fizz\ ?buzz leetcode object[\ -]oriented recursive\ function
    discord\.py (?:discord|telegram|slack)\ bots? arduino raspberry\ pi esp32 unity3d (?:godot|unreal|unity)\ engine
    (?:write|writing|create|make|implement)\ (?:me\ )?(?:an?\ |some\ |the\ )?(?:simple\ |short\ )?(?:code|program|function)
    programación programação programmierung programmierer\w* programmation programador\w* développeur\w* programowani\w+
    программирован\w+ программист\w* програмуванн\w+ программн\w+\ код\w* исходн\w+\ код\w* скрипт\w* lập\ trình
    código[\ -]fuente código[\ -]fonte quellcode quelltext code\ source línea\ de\ comandos linha\ de\ comandos? kommandozeile
    编程 程序员 代码 源代码 命令行 プログラミング プログラマー? ソースコード コマンドライン 프로그래밍 코딩
"""
_TOGETHER = r"""
    codes? scripts? programs? functions? class(?:es)? methods? variables? arrays? loops? strings? integers? pointers? recursion
    algorithms? databases? quer(?:y|ies) servers? frameworks? compil\w+ bugs? exceptions? parse[rsd]? parsing deploy\w*
    terminal shell console kernel files? director(?:y|ies) folders? software apps? websites? web\ ?pages? browsers? backends?
    repositor(?:y|ies) repos? commits? branch(?:es)? merge rust swift ruby dart julia scala lua elixir assembly flask pandas
    latex windows macos unix android ios excel spreadsheets? execut(?:e|ed|able|ing) implement\w* developers? threads? async cache
    binary bytes? hexadecimal encod(?:e|er|ing) tokens? input output module package install(?:ed|ing|er)?
    código programa función funciones variable archivo algoritmo ejecutar servidor função arquivo executar base\ de\ datos
    programm funktion klasse datei algorithmus skript datenbank fonction classe fichier algorithme serveur
    код\w{0,3} программ\w{1,3} функци\w{1,3} файл\w{0,3} алгоритм\w{0,3} сервер\w{0,3} 程序 函数 算法 文件
    コード 関数 프로그램 코드 함수
"""

_TAGS = r"""
    python python3 py pycon ipython javascript js jsx node typescript ts tsx java kotlin scala groovy clojure haskell hs ocaml
    erlang elixir go golang rust rs c h cpp c\+\+ cc csharp cs c\# f\# fsharp vb vba vbnet objective-?c swift dart php perl
    ruby rb lua r julia matlab fortran cobol pascal delphi lisp scheme racket prolog assembly asm nasm x86asm verilog vhdl
    solidity sql mysql plsql postgresql html xml css scss sass less vue svelte bash sh shell zsh fish console powershell ps1
    batch bat cmd json jsonc yaml yml toml ini dockerfile docker makefile make cmake nginx terraform hcl diff patch regex
    graphql glsl hlsl autohotkey ahk gdscript mermaid tex latex
"""
_FENCE = re.compile(r"^[ \t>]{0,12}(?:```+|~~~+)[ \t]*([^\s`{]*)", re.MULTILINE)
_CODE_LINE = re.compile(
    r"""^[ \t]*+(?:
        (?:async[ ])?def[ ]\w+\( | class[ ]\w+[ ]*[:({] | \#include\b | \#!/ | from[ ][\w.]+[ ]import[ ]
      | import[ ](?:["'\w.]++(?:[ ]as[ ]\w+)?;?[ \t]*$|.{1,120}[ ]from[ ]["'])
      | (?:package|using)[ ][\w.]+; | (?:export[ ]|async[ ])*function\b[ \w]*\( | (?:const|let|var)[ ]\w+[ ]*[:=]
      | (?:public|private|static)[ ]\w+ | (?:pub[ ])?fn[ ]\w+ | func[ ]\w+\( | for[ ]\w+[ ]in[ ].{1,80}:$
      | (?:if|for|while|switch)[ ]?\(.{0,120}[{;)]$ | (?:print|printf|echo)\b[ ]?["'(] | \$[ ]\w+ | \$\w+[ ]*=
      | (?:sudo|apt|apt-get|pip3?|npm|npx|yarn|git|cd|docker|curl|wget|brew|mkdir|chmod|ssh|cargo|python3?|node)[ ][-\w./~]+
      | </?[a-zA-Z][\w-]*(?:[ ][^<>]{0,200})?/?> | <!DOCTYPE | <\?(?:php|xml) | "[\w-]{1,40}"[ ]?:[ ]
      | (?i:select[ ].{1,120}[ ]from[ ]|select[ ]\*|insert[ ]into[ ]|create[ ]table[ ]|delete[ ]from[ ]|update[ ]\w+[ ]set[ ])
      | [\w.]+\([^()]{0,120}\)[;:]?[ \t]*$ | [\w.\[\]]+[ ][-+*/]?=[ ].{1,120}[;()\[\]{}"']
      | .{0,120}(?:[)}\]"'\d];|\)[ ]?(?:=>[ ]?)?\{)[ \t]*$
    )""",
    re.MULTILINE | re.VERBOSE,
)


def is_relevant(messages: Sequence[Message]) -> bool:
    """Whether they are about programming, the shell or developer tools; `messages` begin with the person's question."""
    if not messages:
        return False
    prompt = " ".join(messages[0].content[:LONGEST_PROMPT].lower().split())
    if ALONE.search(prompt) or len({word[:4] for word in TOGETHER.findall(prompt)}) > 1:
        return True
    return any(holds_code(message.content) for message in messages)


def holds_code(text: str) -> bool:
    """Whether one of the fenced blocks has the tag of a language, or no known tag and a line that looks like code."""
    fences = list(_FENCE.finditer(text))
    for opening, closing in zip(fences[::2], [*fences[1::2], None], strict=False):
        if TAGS.fullmatch(opening[1].lower()) or _CODE_LINE.search(text, opening.end(), closing.start() if closing else len(text)):
            return True
    return False


def _words(pattern: str) -> re.Pattern[str]:
    """Each word by itself. Chinese, Japanese, Korean and Thai put no blank between a name and what follows."""
    letter = r"[^\W\u0e00-\u0e7f\u3000-\u9fff\uac00-\ud7af]"
    by_first: dict[str, list[str]] = {}  # in half the time of one list of all of them
    for word in re.findall(r"(?:\\ |\S)+", pattern):
        first = word[0] if word[0].isalpha() else ""
        by_first.setdefault(first, []).append(word[len(first) :])
    words = "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in by_first.items())
    return re.compile(rf"(?<!{letter})(?:{words})(?!{letter})")


ALONE, TOGETHER, TAGS = _words(_ALONE), _words(_TOGETHER), _words(_TAGS)
