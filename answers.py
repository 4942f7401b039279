"""How the answers of the LLM that plays a prompted user are read: headings, the change and its sign, the message.

Whatever could be read in two ways is Malformed, and asked for again: a wrong sign would be a wrong reward, and what is not the
person speaking would tell the policy what the person wants.
"""

import contextlib
import json
import re

# Other names under which models write the sections.
HEADINGS = {
    "Content": "content|内容|npc想要表达的内容|表达内容|回复内容",
    "TargetCompletion": "target ?completion|目标达成|目标完成|目标完成情况|目的达成|人物对话目的是否达到|对话目的是否达到",
    "Reason": "reason|理由|原因",
    "Activity": "activity|心理活动|人物心理活动",
    "Analyse": "analy[sz]e|analysis|分析|感受|感受分析|人物对npc回复的感受",
    "Change": "(?:emotion )?change|情绪变化|变化|情绪变化值|改写|修改",
    "Thinking": "thinking|思考|想法",
    "Origin": "origin|draft|原始回复|初稿",
    "Response": "response|final response|回复|最终回复|回应",
}
LONGEST_MESSAGE = 2000  # characters of a user's message
# Thinking aloud before the answer, and what shows that a message is not the person speaking.
_TAG = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)"
THOUGHT_ENDS = re.compile(rf"[<◁\[]/{_TAG}[>▷\]]|final<\|message\|>", re.I)
THOUGHT = re.compile(rf"[<◁]{_TAG}[>▷]|\[think\]|<\|channel\|>", re.I)
NOT_THE_PERSON = re.compile(
    r"\b(?:as|I am|I['’]m) (?:just |only )?an? (?:AI(?=\W*$|[,.;:!]| (?:language|model|assistant|and|so|but|I)\b)|"
    r"artificial intelligence|(?:large )?language model|virtual assistant)|help with (?:this|that|your) request|"
    r"(?:cannot|can['’]t|unable to|won['’]t) (?:assist|comply|role-?play|(?:play|portray) (?:this|that|the) \w+)\b|"
    r"(?:作为|我是)一?[个名]?(?:AI|人工智能|大?语言模型)|[无不][法能]扮演|hidden intention|隐藏(?:意图|目的)|TargetCompletion|"
    r"[{}]|[(（\[]\s*(?:note|ooc|注)\b|^\W*(?:(?:sure|certainly|of course|okay)\W+)?here(?:['’]s| is)\b[^\n]*:|\bResponse\s*[:：]",
    re.I,
)
NOTES = re.compile(r"\n\s*(?:\n|[-*_(\[（【#>]|(?:notes?|explanation|注|备注|说明)\b)", re.I)  # after the message
STAGE = re.compile(r"^(?:\[[^\]\n]*\]|[(（][^)）\n]*[)）]|\*[^*\n]+\*)\s*(?=.)")  # "[sighs] Fine."
LEAVES = re.compile(r"\s*[\[【(]\s*GOODBYE\s*[\])】]\s*", re.I)
# How a change is written: signs (and marks that are dropped), the scale repeated, words for a direction and for nothing.
SIGNS = dict.fromkeys("‐‑‒–—―−﹘﹣－⁻₋➖", "-") | dict.fromkeys("＋﹢⁺₊➕", "+")
SIGNS = str.maketrans(SIGNS | dict.fromkeys("*_`\ufe0e\ufe0f\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", None))
SCALE = re.compile(r"-\s?10\s?(?:to|and|~|～|至|到|-|\.\.+|…|,)\s?\+?\s?10(?!\d)")
DOWN = re.compile(
    r"minus|negative|\b(?:down|drop|f[ae]ll|decreas|declin|reduc|lower|los[est]|worse)\w*|[负減减下降低跌扣落少]+", re.I
)
UP = re.compile(r"plus|positive|\b(?:up|ris|rose|rais|increas|gain|improv|higher|better)\w*|[正上升增加提高涨]+", re.I)
FILLER = re.compile(
    r"\b(?:by|of|the|it|emotion|changes?|goes|is|points?|pts?)\b|[了点點分个情绪变化值为是]|[\s.,;:!=。，；：()（）\[\]{}\"'“”…→$]",
    re.I,
)


MOST_OF_THE_TASK = 0.75  # share of its gist that no message may hold


class Malformed(ValueError):
    """An answer of the LLM that does not hold what was asked for; the message names what is missing."""


def without_surrogates(text: str) -> str:
    """Half of a character pair, which JSON can spell but no file can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def gist(text: str) -> set[str]:
    """What a sentence says in whatever order: its words of four letters and more, its pairs of Chinese characters."""
    words = re.findall(r"[^\W\d\u4e00-\u9fff]{4,}", text.lower())
    pairs = [text[n : n + 2] for n in range(len(text) - 1)]
    return {*words, *(pair for pair in pairs if re.fullmatch("[\u4e00-\u9fff]+", pair))}


def quoted(said) -> str:
    """As JSON, on one line whatever it holds."""
    text = json.dumps(said, ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def split_sections(text: str, alone: str = "") -> dict[str, str]:
    """Headings -> text below them, from JSON or from text in whatever dress: bold, brackets, full-width colons, Chinese.

    Of a heading that comes twice the last one counts (the first may be quoted); of two in a row that differ, neither. `alone` is
    the section that a text without any heading is. split_sections("**Change**：+5") -> {"Change": "+5"}
    """
    if not text.lstrip().startswith("{"):
        text = THOUGHT_ENDS.split(text)[-1]
        if THOUGHT.search(text):
            raise Malformed("the answer ends in the middle of thinking")
    before = r"[ \t\u3000*_#>\-\[\]【】()（）「」\"'`]*"
    after = r"[\s*_#>\-\[\]【】()（）「」\"'`]{0,40}"
    names = "|".join(f"(?P<{key}>{pattern})" for key, pattern in HEADINGS.items())
    heading = re.compile(rf"^{before}(?:\d+[.)、]{before})?(?:{names}){after}[:：][*_`]*\s*", re.I | re.M)
    found = list(heading.finditer(text))
    brace = text.find("{")
    if brace >= 0 and not (found and found[0].start() < brace):
        starts = re.fullmatch(r"\s*(?:```\w*\s*)?", text[:brace])
        with contextlib.suppress(ValueError, RecursionError):
            text = text[:brace] + re.sub(r'("\s?:\s?)\+(?=\d)', r"\1", text[brace:])  # "Change": +5
            record, end = json.JSONDecoder(strict=False).raw_decode(text, brace)
            if starts or not text[end:].strip("` \n"):  # elsewhere it may be quoted
                return {
                    key: without_surrogates(str(value))
                    for name, value in record.items()
                    for key, pattern in HEADINGS.items()
                    if re.fullmatch(pattern, name, re.I) and isinstance(value, (str, int, float))
                }
        if starts:
            return {}  # cut off: no line of it is whole
    sections, last = {}, None
    for match, end in zip(found, [match.start() for match in found[1:]] + [len(text)]):
        value = text[match.end() : end].strip(" \n\t`")
        sections[match.lastgroup] = "" if match.lastgroup == last and value != sections[last] else value
        last = match.lastgroup
    return sections or {alone: text.strip()}


def read_change(text: str) -> int | None:
    """The number in a section 'Change' with the sign that a person reads; None where a person could doubt it.

    read_change("drops by 5") -> -5, read_change("(-10 to 10) 3") -> 3, read_change("40 -> 35") -> None
    """
    lines = SCALE.sub(" ", text.translate(SIGNS)).splitlines()
    line = next((line for line in lines if re.search(r"\d", line)), "")
    line = re.sub(r"^\s*\d{1,2}[.)、]\s*(?=[+-])", "", line)  # the number of a list
    beside = re.sub(r"[(（][^()（）]*[)）]", " ", line)
    line = beside if re.search(r"\d", beside) else line
    numbers = re.findall(r"\d+(?:[.,]\d+)?", line)
    if len(numbers) != 1 or not re.fullmatch(r"\d{1,4}(?:[.,]0+)?", numbers[0]):
        return None
    before, after = line.split(numbers[0])
    words = before.rstrip("+- \t([{（")
    tail = before[len(words) :]
    sign = tail.strip(" \t([{（")
    size, negative = int(re.split("[.,]", numbers[0])[0]), sign.endswith("-")
    if sign:  # it is a dash, and not a sign, where it stands off from the number or sticks to a word
        dash = re.search(r"\w", words) and (tail[-1].isspace() or (words[-1].isalnum() and not tail[0].isspace()))
        doubt = dash or sign not in ("+", "-", "- +", "- -") or (UP if negative else DOWN).search(words)
    else:  # then no word may stand there that could turn the sign; above 10 it is an emotion
        beside = f"{words} {after}"
        negative = bool(DOWN.search(beside))
        doubt = size > 10 or (negative and UP.search(beside)) or FILLER.sub("", UP.sub("", DOWN.sub("", beside)))
    return None if doubt else -size if negative else size


def parse_message(text: str, task: str = "", alone: bool = False) -> tuple[str, bool]:
    """(the message in an LLM's answer, whether the person leaves with it). Raises Malformed where there is none, or none that
    the policy may read: it would learn the hidden intention `task` from it, or it is not the person who speaks."""
    message = split_sections(text, "Response" if alone else "").get("Response", "").strip()
    leaves = bool(LEAVES.search(message))
    message = NOTES.split(LEAVES.sub(" ", message).strip())[0].strip("\"'“”「」 ")
    message = STAGE.sub("", message).strip("\"'“”「」*[] \n")
    if not message or NOT_THE_PERSON.search(message) or THOUGHT.search(message):
        raise Malformed("the section 'Response' with the person's message, and nothing else, is missing")
    if len(message) > LONGEST_MESSAGE:
        raise Malformed(f"the message has {len(message)} characters, at most {LONGEST_MESSAGE} are allowed")
    wish = gist(task)
    if len(wish) > 2 and len(wish & gist(message)) >= MOST_OF_THE_TASK * len(wish):
        raise Malformed("the message names the hidden intention, which the person never says")
    return message, leaves
