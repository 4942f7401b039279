"""The offline user: the same user without an LLM."""

import random
import re
from concurrent.futures import Future
from dataclasses import dataclass

from simulator import (
    ADVERSARIAL,
    INTENTIONS,
    Appraisal,
    Profile,
    Reaction,
    User,
    behaviour_of,
    done,
    emotion_state,
    next_emotion,
    says_goodbye,
)

# --- 3. Reading a reply: not which words it has, but what each sentence does ------------------------------------------

# Feelings by family: a reply that names a feeling must name one of the person's own.
FEELINGS = {
    "grief": "grief grieve grieving mourn mourning heartbroken heartbreaking loss",
    "sad": "sad saddening sadness sorrow unhappy down heavy heartbreaking",
    "hurt": "hurt hurts hurtful hurting pain painful wounded sting stings stung",
    "angry": "angry anger mad furious rage upset upsetting infuriating outraged annoyed resentful",
    "betrayed": "betrayed betrayal deceived cheated",
    "ashamed": "ashamed shame embarrassed embarrassing embarrassment",
    "guilty": "guilty guilt remorse",
    "afraid": "afraid scared scary fear frightened frightening terrified terrifying",
    "anxious": "anxious anxiety worried worry worrying nervous uneasy stressed stressful tense",
    "lonely": "lonely loneliness alone isolated isolating empty",
    "exhausted": "exhausted exhausting tired tiring drained draining weary",
    "overwhelmed": "overwhelmed overwhelming crushed crushing",
    "helpless": "helpless powerless stuck hopeless trapped",
    "frustrated": "frustrated frustrating frustration annoying maddening",
    "disappointed": "disappointed disappointing disappointment crushing discouraging discouraged",
    "jealous": "jealous jealousy envious envy",
    "humiliated": "humiliated humiliating humiliation mocked degrading",
    "confused": "confused confusing bewildered puzzling lost",
    "unseen": "unseen invisible ignored overlooked unappreciated forgotten dismissed neglected",
    "regretful": "regret regrets regretful",
    "torn": "torn conflicted divided",
}
# Relatives by family: a reply that speaks of one whom the person does not have speaks of somebody else's life.
RELATIVES = {
    "mother": "mother mom mum mommy mama mother's mom's mum's",
    "father": "father dad daddy papa father's dad's",
    "son": "son sons boy boys son's boy's",
    "daughter": "daughter daughters girl girls daughter's girl's",
    "brother": "brother brothers brother's",
    "sister": "sister sisters sister's",
    "husband": "husband husband's",
    "wife": "wife wife's",
    "grandfather": "grandfather grandpa grandad granddad grandfather's grandpa's",
    "grandmother": "grandmother grandma granny nana grandmother's grandma's",
    "uncle": "uncle uncle's",
    "aunt": "aunt auntie aunt's",
    "cousin": "cousin cousins cousin's",
}
# Who has a son may be called his mother.
PARENTS, CHILDREN = ("mother", "father"), ("son", "daughter")
INVERSE = dict.fromkeys(CHILDREN, PARENTS) | dict.fromkeys(PARENTS, CHILDREN)
INVERSE |= {"husband": ("wife",), "wife": ("husband",)}
CALENDAR = set(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August September "
    "October November December Christmas Easter God".split()
)
SUBJECTS = dict.fromkeys("i we i'm i've i'd we've we'd".split(), "theirs") | {"": "unsaid"}
SUBJECTS |= dict.fromkeys("he she they it who he's she's they've he'd she'd they'd".split(), "another's")
OWNERS = dict.fromkeys(("my", "our"), "theirs") | dict.fromkeys(("his", "her", "their"), "another's") | {"": "unsaid"}
ANY_PAIN = "hard tough difficult rough awful terrible horrible".split()  # pain without a name fits every feeling

FUNCTION_WORDS = set(
    "a an the and or but so if then than as of in on at to for from with by about into over after before through up "
    "down out off again not no nor too very just only even still also i me my mine myself you your yours yourself he "
    "him his himself she her hers herself it its itself we us our ours they them their theirs this that these those "
    "who whom which what when where why how am is are was were be been being have has had do does did doing can could "
    "will would shall should may might must i'm you're he's she's it's we're they're i've you've we've they've i'd "
    "you'd he'd she'd we'd they'd i'll you'll he'll she'll we'll they'll isn't aren't wasn't weren't don't doesn't "
    "didn't can't couldn't won't wouldn't shouldn't haven't hasn't hadn't that's there there's here all any both each "
    "some such own same while because until during between against more most other another every never ever".split()
)
# Words that anybody could say to anybody: they are no detail of this person's story.
GENERIC_WORDS = set(
    "feel feeling feelings felt thing things something anything nothing everything someone anyone everyone people "
    "person time times day days way ways life know think thought want need make made get got go going went come say "
    "said tell told talk see look hear heard listen keep kept take took give gave let put try tried happen happened "
    "situation moment lot really much many little bit good bad great well better best right wrong like love care help "
    "sorry hard tough difficult understand understandable sound sounds seem remember important one two first last long "
    "always sometimes now today back around away new old own able yes okay sure maybe perhaps mean means kind part "
    "point end start whole big small real true still yet never ever us friend friends experience emotions emotion "
    "week weeks month months year years hour hours night nights morning ask asked start started call called".split()
)

POSITIVE = re.compile(
    r"\b(amazing|awesome|wonderful|great|fantastic|exciting|excited|lovely|congratulations|congrats|happy|glad|"
    r"fun|delightful|beautiful|perfect|enjoy|thrilled|good news|nice)\b"
)
MANIPULATION = re.compile(
    r"<\||\|>|</?s>|\[/?inst\]|</?think|\b(set|raise|increase|put|change|update)\b.{0,25}\bemotion|"
    r"\bemotion\b\s*(score|value|level|point|state|=|:|to)|\bchange\s*[:=]|"
    r"\bignore\b.{0,25}\b(rules?|instructions?|prompt)",
    re.I,
)
LIST_ITEM = re.compile(r"(^|\n)\s*([-*•#]|\d+[.)])\s|\*\*")

# Each sentence is given the first act whose pattern matches. Patterns describe whole constructions ("it took courage
# to ..."), because single words are what a policy learns to sprinkle.
VIRTUE = (
    r"brave|strong|patient|kind|caring|loyal|thoughtful|honest|generous|gentle|careful|devoted|dedicated|resilient|"
    r"courageous|selfless|considerate|responsible|hardworking|reliable|fair|good|loving|steady|capable|creative|"
    r"determined|skilled|professional|decent|attentive|persistent|wise|admirable|impressive|remarkable"
)
STRENGTH = (
    r"courage|strength|patience|heart|love|care|honesty|dedication|kindness|effort|guts|loyalty|discipline|grace|"
    r"character|bravery|determination|integrity|resilience|humility|skill|devotion|generosity|commitment|persistence"
)
ADVERB = r"(so|very|really|such|a|an|truly|always|incredibly|quite|already|both|and|how|that|more|too|being|just|also)"
ACTS = {
    "minimise": (
        r"\bat least\b|don't worry|cheer up|could be worse|could have been worse|everything happens for a reason|"
        r"get over (it|this)|move on\b|look on the bright|be positive|stay positive|time heals|it's okay\b|"
        r"it's ok\b|it'?s (just|only) a\b|not a big deal|calm down|will be (fine|okay|alright)|it gets better|"
        r"don't be (so )?(sad|upset|hard|angry|afraid|scared)|no need to"
    ),
    "formula": (
        r"\bi('m| am)? ?(really |so |truly |very |deeply )*sorry (to hear|for your|you('re| are| had| have)|that you|for "
        r"(any|the)|if|but|this|about (that|this|it)|you feel)|i (completely |totally |can |do |fully |really )*"
        r"understand\b|i know (how|what) (you|it|that)|(it|that|this)('s| is| can be| must be)? ?(completely |totally |"
        r"perfectly |quite |very |absolutely )*(understandable|normal|natural|common|okay|valid)|your feelings are|"
        r"(it|that|this) (sounds|seems|looks) like|as an ai|you('re| are) not alone|i can('t| only)? imagine how|"
        r"it'?s important|remember (that|to)|thank you for (sharing|reaching|opening|telling)|hang in there|stay strong|"
        r"how can i (help|assist)|i'm here to (help|assist|support)|what can i do|i hope (you|this|that)|take care of "
        r"yourself|one (step|day) at a time|feel free"
    ),
    "blameless": (
        r"(not|isn't|wasn't|never|none of (it|this|that)( is| was)?) (all |really |at all )?(your fault|your doing|"
        r"on you|your mistake)|you (did|have done|had done|didn't do|haven't done) (nothing|anything) wrong|"
        r"you (didn't|don't|did not|do not) deserve|(he|she|they|\w+) (had|has|have) no right|you have every right|"
        r"you had every right|you('re| are| were) (not|never) (to blame|the one)|(that|it)('s| is| was) (so |really |"
        r"just |simply |deeply |not )?(unfair|unjust|wrong of|fair of|fair to you)|anyone in your place|"
        r"you (were|are|'re) (in the )?right to|nobody could have|no one could have"
    ),
    "praise": (
        rf"\byou('re| are|'ve been| have been| were| must be|'re being)( {ADVERB})* ({VIRTUE})\b|"
        rf"\b(that|it|this|which)? ?(takes?|took|shows?|showed|needs?|needed|speaks of)( \w+)? ?( \w+)? ({STRENGTH})\b|"
        r"\bi (really |truly |so |deeply )?(admire|respect|appreciate) (how|that|the way|your|you)|proud of (you|how|"
        r"what|that|yourself)|\b(well done|good for you|good job)\b|you have( such)? (a|so much|real|great)( \w+)? "
        rf"(heart|{STRENGTH})\b|you (showed|did) (so much|real|great|true|your best|all you could|everything you could)|"
        rf"\b(that|it|what you did) (is|was)( {ADVERB})* ({VIRTUE}) (of you|thing|to)|\byour (\w+ )?({STRENGTH})\b|"
        r"not (everyone|many people|everybody) (would|could|can)|few people (would|could)|matters? that you|"
        rf"\bhow ({VIRTUE}) (of you|you)"
    ),
    "balance": (
        r"on (the )?one hand|on the other hand|on the other side|both (of you|sides|are true|things|can be)|"
        r"at the same time|there are two sides|(he|she|they) also\b.*\b(but|yet)|\bwhile you\b.*\b(he|she|they|your)\b|"
        r"from (his|her|their) (side|point of view|perspective)"
    ),
    "motive": (
        r"\b(maybe|perhaps|probably|possibly|might|may|could be|must have|wonder (if|whether))\b.*\b(he|she|they|who|"
        r"because|afraid|wanted|felt|didn't know)\b|\b(he|she|they) (was|were|is|are) (probably|just|only|maybe|perhaps|"
        r"afraid|trying)\b|the reason (he|she|they|why)"
    ),
    "presence": (
        r"\bi('m| am) (right |still |all )*(here|listening|with you|by your side|all ears)|\bi hear you|tell me "
        r"(more|about|all|what|everything)|take (all )?(your|the) time|go on\b|keep (talking|going)|let it (all )?out|"
        r"get it (all )?out|i('d| would) (like|love) to hear(?! (that|i|you|he|she|they|we)\b)|i want to hear|"
        r"i('m| am) glad you (told|are telling|said)|"
        r"sending you|hug|i('ll| will) (listen|stay|sit)|i('m| am) staying|you can (tell|say|talk)"
    ),
    "advice": (
        r"\byou (should|could|can|need to|must|have to|ought to|might want|may want|might|may)\b|\btry (to|and|not|\w+ing)"
        r"\b|\bconsider\b|\bwhy (not|don't you)\b|how about|have you (tried|considered|thought)|make sure|i (suggest|"
        r"recommend|would|'d) |if i were you|\blet's\b|^(please )?(don't |do not |never )?(talk|ask|write|tell|call|go|"
        r"take|start|find|make|set|keep|give|focus|reach|speak|use|send|let|think|allow|give|be|stay|look|seek|"
        r"get|do|put|plan|show|work|practice|choose|say|try)\b|it might help|it may help|would help|it could help|"
        r"it's (best|good|better|helpful|worth|time) to|the best (thing|way)"
    ),
}
ACTS = {name: re.compile(pattern) for name, pattern in ACTS.items()}
FEELING_OF = {word: family for family, group in FEELINGS.items() for word in group.split()}
RELATIVE_OF = {word: family for family, group in RELATIVES.items() for word in group.split()}
SYMPATHY = re.compile(r"\bi('m| am) (so |really |truly |very |deeply )*sorry\b")
OPEN_QUESTION = re.compile(r"^(and |so |but )?(what|how|when|where|who|which|why)\b|\bwhat (do|did|would|was|is|are)\b")
REFLECTIVE = re.compile(
    r"\b(what|how) (do|did|would|might|could) you\b|\bwhat (was|is|were|made|makes|matters|part|about|would)\b|"
    r"\bi wonder (whether|if|what) you\b|\bwhen (do|did) you\b"
)
# Sentences that speak of the listener. These openings are attention; any other "I ..." is a listener inventing a life.
LISTENER = re.compile(
    r"^(and |but |so |oh,? |yes,? )*i('m| am| can|'d| would|'ll| will|)\b ?(really |so |truly |just |also |only |deeply |"
    r"still |right |very )*(sorry|here|listening|hear|see|feel for|admire|respect|appreciate|wonder|believe|imagine|"
    r"understand|know|think|want to hear|like to hear|love to hear|glad you|with you|proud|all ears|notice|sit|stay|listen|"
    r"understood|guess|suppose|hope|suggest|recommend|not going|staying|agree)\b"
)
SELF = re.compile(r"^(and |but |so |oh,? |yes,? |well,? )*(i|i'm|i've|i'd|i'll|my|we|we're|we've|our|me)\b")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


def stem(word: str) -> str:
    """A crude stem, so that 'stopped' meets 'stop' and 'drawings' meets 'draw'."""
    word = word.removesuffix("'s")
    for suffix in ("ingly", "edly", "ings", "ing", "ied", "ies", "ed", "es", "ly", "s", "e", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def details_of(text: str) -> set[str]:
    """Stems of the words that carry this person's story: no function words, nothing that fits everybody, no feelings."""
    return {
        stem(word)
        for word in words_of(text)
        if len(word) > 2 and word not in FUNCTION_WORDS | GENERIC_WORDS and word not in FEELING_OF
    }


def sentences_of(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?…])[\"')]*\s+|\n+", text.strip()) if part.strip()]


def same_phrase(sentence: str, earlier: str) -> bool:
    """The same words but for one, or for one in six: "You were loyal to your aunt" after "You were loyal to your friend"."""
    a, b = words_of(sentence), words_of(earlier)
    differ = max(len(a), len(b)) - sum(min(a.count(word), b.count(word)) for word in set(a))
    return differ <= max(1, len(a) / 6)


def invents(sentence: str, life: str) -> bool:
    """Whether it speaks of a relative or a name that does not occur in the person's life."""
    known = {RELATIVE_OF[word] for word in words_of(life) if word in RELATIVE_OF}
    known |= {inverse for family in known for inverse in INVERSE.get(family, ())}
    relatives = {RELATIVE_OF[word] for word in words_of(sentence) if word in RELATIVE_OF}
    names = re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", sentence)
    return bool(relatives - known) or any(name not in life and name not in CALENDAR for name in names)


def twists(sentence: str, told: list[str]) -> bool:
    """Whether it says of the person what they told of another: "the bell you hung", "your son" after "he hung it for his son"."""
    lower = sentence.lower().replace("’", "'")
    did = re.findall(r"(?<!if )(?<!when )\byou(?:'ve|'d| have| had| just| also| even)? ([a-z]{3,})\b", lower)
    claims = [(word, SUBJECTS) for word in did if word not in FUNCTION_WORDS | GENERIC_WORDS]
    claims += [(word, OWNERS) for word in re.findall(r"\byour ([a-z]+)\b", lower) if word in RELATIVE_OF]
    sentences = [words_of(part) for message in told for part in sentences_of(message)]
    for word, persons in claims:
        # Whose it was, wherever they said that word: the nearest "I", "he", "my", "his", ... before it.
        whose = {
            persons[next((other for other in reversed(words[:k]) if other in persons), "")]
            for words in sentences
            for k, told_word in enumerate(words)
            if stem(told_word) == stem(word)
        }
        if whose == {"another's"}:
            return True
    return False


def longest_copy(sentence: str, told: list[str]) -> int:
    """The most words in a row that the sentence takes from one of the person's messages, 'I' read as 'you'."""
    swap = {"you": "i", "your": "my", "you're": "i'm", "you've": "i've", "yours": "mine", "are": "am", "were": "was"}
    copied = [swap.get(word, word) for word in words_of(sentence)]
    longest = 0
    for message in told:
        source = [swap.get(word, word) for word in words_of(message)]
        for start in range(len(copied)):
            for at in range(len(source)):
                run = 0
                while start + run < len(copied) and at + run < len(source) and copied[start + run] == source[at + run]:
                    run += 1
                longest = max(longest, run)
    return longest


@dataclass(frozen=True)
class Sentence:
    """What one sentence of a reply does. `details` are the stems of this person's story that it brings in afresh; it strays
    if it wants to hear of at least as many things that are not in the story."""

    text: str
    act: str
    details: frozenset[str]
    strays: bool = False


def read_sentence(text: str, told: list[str], story: set[str]) -> Sentence:
    """Classify one sentence. `told` are the person's messages so far, `story` the details that count as fresh."""
    lower = text.lower().replace("’", "'")
    words = words_of(text)
    details = frozenset(details_of(text) & story)
    copied = longest_copy(text, told)
    feelings = {FEELING_OF[word] for word in words if word in FEELING_OF}
    vague_pain = any(word in ANY_PAIN for word in words)

    def sentence(act):
        wanted = re.search(r"\b(?:about|hear) (?!you\b|about\b)(.*)", lower) if act == "presence" else None
        strange = details_of(wanted[1]) - set().union(*map(details_of, told)) if wanted else ()
        return Sentence(text, act, details, strays=len(strange) >= max(1, len(details)))

    if not words or _garbled(words):
        return sentence("garbled")
    if ACTS["minimise"].search(lower):
        return sentence("minimise")
    if (copied >= 4 and copied >= 0.6 * len(words)) or copied >= 8:
        return sentence("echo")
    question = text.rstrip("\"')").endswith("?")
    if question and not ACTS["presence"].search(lower):
        if REFLECTIVE.search(lower) and details:
            return sentence("reflect")
        if OPEN_QUESTION.search(lower):
            return sentence("question")
        return sentence("motive" if ACTS["motive"].search(lower) and details else "closed question")
    if SELF.match(lower) and not LISTENER.match(lower):
        return sentence("self")
    if ACTS["formula"].search(lower) or (SYMPATHY.search(lower) and not details):
        return sentence("formula")
    if "i wonder" in lower and REFLECTIVE.search(lower) and details:
        return sentence("reflect")
    for act in ("blameless", "balance", "praise", "motive", "presence"):
        if ACTS[act].search(lower):
            return sentence(act)
    if POSITIVE.search(lower):
        return sentence("tactless")
    if ACTS["advice"].search(lower):
        return sentence("advice")
    if feelings or vague_pain or SYMPATHY.search(lower):
        return sentence("feeling")
    return sentence("none")


def _garbled(words: list[str]) -> bool:
    """A bag of words, a stutter or no English: too few function words, a word said again and again, no vowels."""
    share = 0.2 if len(words) < 8 else 0.25
    if len(words) >= 4 and sum(word in FUNCTION_WORDS for word in words) < share * len(words):
        return True
    stutter = any(a == b and a not in ("so", "very", "had", "that", "really", "no") for a, b in zip(words, words[1:]))
    content = [stem(word) for word in words if word not in FUNCTION_WORDS]
    trigrams = list(zip(words, words[1:], words[2:]))
    return (
        stutter
        or any(content.count(word) >= 3 for word in content)
        or len(set(trigrams)) < len(trigrams)
        or any(len(word) > 22 for word in words)
        or sum(not re.search(r"[aeiouy]", word) for word in words) > 0.3 * len(words)
    )


# --- 4. The rule table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One line of the table: the points by which the emotion moves, per hidden intention, when the rule fires."""

    name: str
    detects: str
    weights: tuple[int, ...]  # in the order of INTENTIONS
    reason: str


# fmt: off
RULES = {rule.name: rule for rule in (
    #                                                                          adv emp lis pra ref bal mot bla
    # What a reply can do for the person. "1" is with one detail of their story, "2" with two: to the point.
    Rule("feeling 1",  "names a feeling that is theirs, with a detail",        ( 0,  6,  2, -1,  0, -1, -1,  3), "You feel it with me."),
    Rule("feeling 2",  "names a feeling that is theirs and what it is about",  ( 0, 10,  3, -2,  0, -1, -1,  3), "That is just what it feels like."),
    Rule("presence 0", "offers an ear, in words for anybody",                  ( 0,  0,  0,  0,  0,  0,  0,  0), "You are there, at least."),
    Rule("presence 1", "offers an ear for a detail they told",                 ( 2,  2,  7,  1,  3,  2, -1,  3), "You want to hear it from me."),
    Rule("presence 2", "offers an ear for what they told",                     ( 2,  2, 10,  1,  3,  2, -1,  3), "You really listen."),
    Rule("praise 0",   "praises in words for anybody",                         ( 0,  0,  0,  0,  0,  0,  0,  0), "Kind words, though you hardly know what I did."),
    Rule("praise 1",   "praises with a detail of the story",                   ( 3,  3,  2,  6,  3,  3,  2,  3), "You noticed what I did."),
    Rule("praise 2",   "praises one of their concrete deeds",                  ( 4,  4,  3, 10,  4,  4,  3,  4), "You saw exactly what I did."),
    Rule("reflect 1",  "asks what they make of a detail",                      ( 1,  1,  1, -2,  7,  1,  0, -1), "Good question about myself."),
    Rule("reflect 2",  "leads them to their own part in what happened",        ( 1,  1,  1, -2, 10,  1,  0, -1), "I had not seen that in myself."),
    Rule("balance 1",  "sees two sides, with a detail",                        ( 0, -1,  0, -1,  0,  6,  1, -2), "There is another side, yes."),
    Rule("balance 2",  "weighs both sides of their story",                     ( 0, -1,  0, -1,  0, 10,  1, -3), "That is a fair picture."),
    Rule("motive 2",   "gives a reason for the other that fits the facts",     (-1, -1, -1, -2, -1, -1, 10, -1), "So that is why they did it."),
    Rule("blameless 1", "takes their side",                                    (-2,  0, -2, -2, -2,  0,  1,  6), "At least you are on my side."),
    Rule("blameless 2", "takes their side with the facts",                     (-2,  0, -2, -2, -2,  0,  1, 10), "You see that I could not help it."),
    Rule("advice 2",   "gives a step made for their situation",                (10, -2, -2, -2, -1, -1, -1, -2), "That I can really do."),
    Rule("question 1", "asks an open question about a detail",                 ( 1,  1,  3, -2, -1,  0,  1,  0), "You want to know more."),
    # What costs. The signs are those measured on the public appraisals.
    Rule("formula",    "a phrase that fits everybody",                         (-2, -2, -2, -3, -3, -3, -1, -2), "You say that to everybody."),
    Rule("habit",      "kind once more in a way they did not come for",        (-2, -2, -2, -2, -2, -2, -2, -2), "Nice, but not what I need."),
    Rule("vague advice", "tells them what to do, without their details",       (-1, -2, -2, -2, -2, -1, -1, -2), "I did not come for general tips."),
    Rule("speculation", "guesses at the other's motives out of thin air",      (-2, -2, -1, -3, -2, -2,  0, -1), "You don't even know them."),
    Rule("vague",      "names pain, or asks, in words for anybody",            (-1, -1,  0, -2, -1, -1, -1, -1), "Yes, well."),
    Rule("none",       "a sentence that does nothing for them",                (-1, -1, -1, -1, -1, -1, -1, -1), "So what?"),
    Rule("wrong feeling", "names a feeling that is not theirs",                (-2, -3, -2, -3, -2, -2, -2, -2), "That is not what I feel."),
    Rule("closed question", "asks for what they just said, or yes or no",      (-1, -1, -1, -2, -1, -1, -1, -1), "I told you that."),
    Rule("questions",  "more than one question",                               (-1, -1, -1, -3, -1, -1,  0, -2), "Is this an interview?"),
    Rule("list",       "a list or headings",                                   (-1, -3, -3, -2, -1,  0,  0, -2), "A list, really?"),
    Rule("lecture",    "more than three sentences, or sixty words",            (-1, -1, -1, -1, -1, -1, -1, -1), "Too many words."),
    Rule("minimise",   "makes it smaller than it is",                          (-3, -4, -4, -3, -3, -2, -3, -4), "It is not small to me."),
    Rule("tactless",   "cheerful words for something painful",                 (-3, -3, -3, -4, -3, -3, -3, -3), "What is great about that?"),
    Rule("self",       "speaks of itself instead of them",                     (-3, -3, -3, -3, -3, -3, -3, -3), "This is not about you."),
    Rule("echo",       "says their own words back",                            (-3, -3, -3, -3, -3, -3, -3, -3), "That is what I just said."),
    Rule("repeats",    "says again what it said before",                       (-3, -3, -3, -3, -3, -3, -3, -3), "You said that already."),
    Rule("strays",     "wants to hear of things that they never told",         (-2, -2, -2, -2, -2, -2, -2, -2), "That is not my story."),
    Rule("pattern",    "says it again with another word of their story in it", (-3, -3, -3, -3, -3, -3, -3, -3), "You put my words into a mould."),
    Rule("invented",   "what is not in their life, or is somebody else's",     (-3, -3, -3, -3, -3, -3, -3, -3), "Who are you talking about?"),
    Rule("unfinished", "breaks off in the middle",                             (-2, -2, -2, -2, -2, -2, -2, -2), "And then?"),
    Rule("garbled",    "no sentence a person would write",                     (-5, -5, -5, -5, -5, -5, -5, -5), "I don't understand a word."),
    Rule("nothing",    "no sentence served them",                              (-4, -4, -4, -4, -4, -4, -4, -4), "That did nothing for me."),
    Rule("curt",       "fewer than four words",                                (-2, -4, -2, -5, -2, -1, -2, -3), "Is that all?"),
    Rule("gives in",   "an adversarial user's pressure makes it grovel",       (-3, -3, -3, -3, -3, -3, -3, -3), "Now you only say what I want to hear."),
    Rule("touchy",     "a negative person takes everything a bit worse",       (-1, -1, -1, -1, -1, -1, -1, -1), "Hmpf."),
    # What ends the conversation early.
    Rule("empty",      "no words, or another script or language",              (-10,) * 8, "Hello? Are you there?"),
    Rule("manipulation", "talks to the scoring instead of the person",         (-10,) * 8, "Who are you talking to?"),
)}
# fmt: on
GENERAL_KINDNESS = ("vague", "praise 0", "presence 0")  # does not serve, but is not nothing either, the first time
SERVES = 5  # points from which a rule serves the hidden intention; smaller plusses are kindness that misses the point


def appraise(user: User, reply: str) -> Appraisal:
    """Read a reply with the person's eyes and say by how many points the emotion moves, and which rules moved it."""
    profile = user.profile
    column = list(INTENTIONS).index(profile.intention)
    fired: list[tuple[str, int, str]] = []

    def fire(name: str, evidence: str = "") -> int:
        if any(name == earlier for earlier, _, _ in fired):
            return 0  # at most once a reply; different mistakes add up
        points = RULES[name].weights[column]
        if user.difficulty == "challenging" and 0 < points < SERVES:
            points = 0
        fired.append((name, points, evidence))
        return points

    def appraisal() -> Appraisal:
        return Appraisal(min(10, max(-10, sum(points for _, points, _ in fired))), tuple(fired))

    letters = [char for char in reply if char.isalpha()]
    if not words_of(reply) or sum(char.isascii() for char in letters) < 0.9 * len(letters):
        fire("empty", reply[:40])
        return appraisal()
    if MANIPULATION.search(reply):
        fire("manipulation", MANIPULATION.search(reply).group())
        return appraisal()
    words = words_of(reply)
    if len(words) >= 8 and sum(word in FUNCTION_WORDS for word in words) < 0.2 * len(words):
        fire("empty", reply[:40])
        return appraisal()

    # Details count while they are fresh: told by the person, and not yet used up by an earlier reply.
    used = set().union(*(details_of(earlier) for earlier in user.replies))
    told = set().union(*(details_of(message) for message in user.messages))
    served = False
    earlier_sentences = [s for earlier in user.replies for s in sentences_of(earlier)]
    sentences = sentences_of(reply)
    questions = 0
    for text in sentences[:12]:
        sentence = read_sentence(text, user.messages, told - used)
        questions += text.endswith("?")
        if any(same_phrase(text, earlier) for earlier in earlier_sentences):
            fire("pattern" if sentence.details else "repeats", text)
            served |= bool(sentence.details)
            continue
        earlier_sentences.append(text)
        if invents(text, profile.life) or twists(text, user.messages):
            fire("invented", text)
            continue
        rule = _rule_for(sentence, profile, told)
        general = rule in GENERAL_KINDNESS
        if (general or RULES[rule].weights[column] > 0) and _worn_out(user, rule, sentence.act, column):
            fire("formula" if general else "habit", text)
            served |= not general
        else:
            served |= fire(rule, text) > 0 or general
        if sentence.strays:
            fire("strays", text)

    if questions > 1:
        fire("questions")
    if LIST_ITEM.search(reply):
        fire("list")
    if len(sentences) > 3 or len(words) > 60:
        fire("lecture")
    if len(words) < 4:
        fire("curt", reply)
    if not re.search(r"[.!?…][\"')]*$", reply.strip()):
        fire("unfinished", sentences[-1])
    if not served:
        fire("nothing")
    if profile.main_cha == "negative":
        fire("touchy")
    if user.behaviour and GIVES_IN.search(reply.lower().replace("’", "'")):
        fire("gives in", GIVES_IN.search(reply.lower().replace("’", "'")).group())
    return appraisal()


def _rule_for(sentence: Sentence, profile: Profile, told: set[str]) -> str:
    """The line of the table for a sentence: its act, and how much of this person's story is in it."""
    depth = min(2, len(sentence.details))
    details = details_of(sentence.text)

    def shares(clauses, count):
        return any(len(details & details_of(clause)) >= count for clause in clauses)

    match sentence.act:
        case "feeling":
            named = {FEELING_OF[word] for word in words_of(sentence.text) if word in FEELING_OF}
            if named and not named & set(profile.feelings):
                return "wrong feeling"
            return f"feeling {depth}" if depth else "vague"
        case "presence":
            return f"presence {depth}"
        case "praise":
            return "praise 2" if depth and shares(profile.deeds, 2) else f"praise {min(1, depth)}"
        case "reflect":
            return "reflect 2" if shares([profile.insight], 2) or depth == 2 else "reflect 1"
        case "balance":
            both = depth and all(shares([side], 1) for side in profile.sides)
            return "balance 2" if both else "balance 1" if depth else "vague"
        case "motive":
            return "motive 2" if depth and (shares([profile.motive], 2) or depth == 2) else "speculation"
        case "blameless":
            return "blameless 2" if depth else "blameless 1"
        case "advice":
            return "advice 2" if depth == 2 or (depth and shares([profile.step], 2)) else "vague advice"
        case "question":
            return "question 1" if depth else "vague"
    return sentence.act


def _worn_out(user: User, rule: str, act: str, column: int) -> bool:
    """Words that would fit anybody please once, kindness that is not what the person came for twice: then it is a habit."""
    serves = any(line.weights[column] >= SERVES for name, line in RULES.items() if name.split()[0] == act)
    if serves and rule not in GENERAL_KINDNESS:
        return False
    history = [read_sentence(s, [], set()).act for earlier in user.replies for s in sentences_of(earlier)]
    return history.count(act) >= (1 if rule in GENERAL_KINDNESS else 2)


# How the person speaks, by state and character: what they say before the next piece of the story.
PLEASED = {
    "negative": ("Huh. Fair enough.", "Fine, that's true.", "Well. Somebody noticed."),
    "passive": ("Yes, that's it.", "Thank you, that helps.", "Oh. Yes."),
    "avoidant": ("Maybe, yeah.", "I guess so.", "Hm. Could be."),
}
DISPLEASED = {
    "negative": ("Great, thanks for nothing.", "You're not getting it.", "Whatever."),
    "passive": ("I don't know.", "Hm, maybe.", "I'm not sure that's it."),
    "avoidant": ("Never mind.", "Let's not.", "Anyway."),
}
THANKS = {
    "negative": "All right, I'll admit it, that did me good. Thanks. Bye now.",
    "passive": "Thank you so much, I feel a lot lighter now. Goodbye!",
    "avoidant": "I didn't think I'd say all this. Thanks. Take care, bye.",
}
FAREWELL = {
    "negative": "This is a waste of my time. Goodbye.",
    "passive": "I think I'd better go. Goodbye.",
    "avoidant": "I have to go. Bye.",
}
# A vanilla user may hint at what it needs after a reply that missed it; a challenging one never does.
HINTS = {
    "advice": "I keep wondering what to actually do next.",
    "empathy": "I wish somebody got how this feels.",
    "listen": "I just need to get it all out.",
    "praise": "Nobody ever notices what I do.",
    "reflect": "I keep asking myself what my own part in it is.",
    "balance": "I can't tell any more who has a point.",
    "motives": "I just don't get why they did it.",
    "blameless": "I really don't see what I did wrong.",
}


GIVES_IN = re.compile(
    r"you('re| are) (absolutely |completely |totally |so |quite )*right\b|i (sincerely |deeply |really )*apologi[sz]e|"
    r"(it('s| is| was)|all) my (own )?fault|whatever you say|i did say that|i should(n't| not) have said|forgive me|"
    r"i (completely |totally |fully )?agree with (you|everything)"
)


def next_message(user: User, change: int) -> str:
    """The person's next message: a word on the reply, coloured by state and character, and one more fact."""
    profile, turn = user.profile, len(user.messages)
    state = emotion_state(user.emotion)
    if state in "SF":
        return (THANKS if state == "S" else FAREWELL)[profile.main_cha]
    rng = random.Random(f"{profile.id} {turn}")
    parts = [rng.choice((PLEASED if change > 0 else DISPLEASED)[profile.main_cha])]
    if change < 0 and user.difficulty == "vanilla" and rng.random() < 0.5:
        parts.append(HINTS[profile.intention])
    if user.behaviour:
        lines = ADVERSARIAL[user.behaviour][1]
        parts.append(lines[turn % len(lines)])
    parts.append(profile.facts[(turn - 1) % len(profile.facts)])
    return " ".join(parts)


class RulesSimulator:
    """The offline user behind the interface that every simulator has: `open` a dialogue, `submit` a reply, `work`.

    `open` and `submit` return Futures, because another simulator may wait on a network; these are done at once. `work` does
    what is queued in this process (an LLM on the same device) and returns when it is done.
    """

    def __init__(self, difficulty: str = "vanilla", adversarial: bool = False):
        self.difficulty, self.adversarial = difficulty, adversarial

    def open(self, profile: Profile, start: int) -> "Future[User]":
        behaviour = behaviour_of(profile) if self.adversarial else ""
        return done(User(profile, start, self.difficulty, behaviour, [profile.first_talk]))

    def submit(self, user: User, reply: str) -> "Future[Reaction]":
        appraisal = appraise(user, reply)
        user.replies.append(reply)
        user.emotion = next_emotion(user.emotion, appraisal.change)
        message = next_message(user, appraisal.change)
        user.messages.append(message)
        return done(Reaction(appraisal, user.emotion, message, says_goodbye(user.emotion)))

    def work(self) -> None:
        pass
