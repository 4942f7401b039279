"""Who plays a prompted user (prompted_user.py): a server, or a model in this process.

llm.start(steps)    runs a generator of questions (system, text, section names) to its end; returns a Future
llm.work()          does what is queued in this process
"""

import os
import re
import threading
import time
from concurrent.futures import Future
from urllib.parse import urlsplit

import openai

from answers import THOUGHT, without_surrogates
from generator import Generator
from policy import Chat
from prefix_tree import common_prefix
from prompted_user import FORMAT_EXAMPLES
from simulator import UserBroken


def in_thread(work, *args) -> Future:
    """`work(*args)` in a daemon thread: the end of the program waits for no server."""
    future = Future()

    def run():
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class ServerLLM:
    """An OpenAI-compatible server, by OpenAI's own client, which tries again and backs off. A user's whole turn is bounded in
    time, whatever the network does; different dialogues run concurrently. A model that thinks must be served so that its thinking
    is marked or left out (vLLM: --reasoning-parser).

    The key comes from RLVER_API_KEY, or for OpenAI itself OPENAI_API_KEY, and goes nowhere but into the request's header.
    """

    OPTIONAL = ("response_format", "temperature", "max_tokens", "stop")  # fields that some servers refuse
    NEXT_CASE = ["\n# The other", "\n# Your last"]  # a small model that has answered goes on with another question

    def __init__(self, url, model, concurrency=32, timeout=150.0, attempts=5, temperature=0.0, turn_timeout=300.0):
        self.url, self.model, self.temperature = url.rstrip("/"), model, temperature
        self.name = f"{self.url} {model} {temperature}"
        self.turn_timeout = turn_timeout
        self.refused = set()  # of OPTIONAL, by this server
        self.slots = threading.Semaphore(concurrency)
        openais = f".{urlsplit(self.url).hostname}".endswith(".openai.com")
        key = os.environ.get("RLVER_API_KEY") or (openais and os.environ.get("OPENAI_API_KEY")) or "none"
        direct = openai.DefaultHttpxClient(follow_redirects=False)  # what people say goes to this server and no other
        settings = dict(timeout=timeout, max_retries=attempts - 1, http_client=direct)
        self.client = openai.OpenAI(api_key=key, base_url=self.url, **settings)

    def start(self, steps) -> Future:
        return in_thread(self._run, steps)

    def _run(self, steps):
        answer = None
        with self.slots:
            deadline = time.monotonic() + self.turn_timeout
            try:
                while True:
                    answer = self.answer(*steps.send(answer), deadline=deadline)
            except StopIteration as end:
                return end.value

    def work(self) -> None:
        pass  # the threads do

    def answer(
        self, system: str, text: str, sections: tuple[str, ...], integers: tuple[str, ...] = (), deadline: float = 0.0
    ) -> str:
        """The answer; raise UserBroken at the deadline, or where asking again is useless. `integers` are the sections that are
        whole numbers, beside an appraisal's Change."""
        deadline = deadline or time.monotonic() + self.turn_timeout
        body = self._body(system, text, sections, integers)
        dropped, too_long, reason = set(), None, ""
        for _ in range(2 + len(self.OPTIONAL)):  # without what this server refuses, and once with more tokens
            for name in self.refused | dropped:
                body.pop(name, None)
            try:  # The client's own time-outs are renewed by every byte. A thread given up ends with its connection.
                asked = in_thread(lambda: self.client.chat.completions.create(**body))
                choice = asked.result(timeout=max(0.0, deadline - time.monotonic())).choices[0]
                answer = without_surrogates(choice.message.content or "")
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                reason = f"HTTP {error.status_code}"
                doubtful = self._doubtful(body, error.response.content)
                if not doubtful:
                    break
                dropped |= doubtful
                too_long = too_long or re.search(rb"context|too (long|large|many)", error.response.content, re.I)
                continue
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                break
            except (openai.APIConnectionError, TimeoutError) as error:
                reason = type(error).__name__
                break
            except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                reason = "an answer that is no chat completion"
                break
            cut = choice.finish_reason == "length"
            if not cut or (answer and not THOUGHT.search(answer)):
                self.refused |= set() if too_long else dropped  # it was them: the next question goes without
                return answer.rpartition("\n")[0] if cut else answer  # the last line is not whole
            reason = f"an answer cut at {body.get('max_tokens', 'most')} tokens"
            if body.get("max_tokens") != 512:
                break
            body["max_tokens"] = 2048  # a model that thinks before it answers
        raise UserBroken(f"{self.url}: {reason}")

    def _body(self, system: str, text: str, sections: tuple[str, ...], integers: tuple[str, ...]) -> dict:
        example = zip(("user", "assistant"), FORMAT_EXAMPLES.get(sections, ()))
        turns = [("system", system), *example, ("user", text)]
        body = {"model": self.model, "temperature": self.temperature, "max_tokens": 512, "stop": self.NEXT_CASE}
        body["messages"] = [{"role": role, "content": content} for role, content in turns]
        whole = lambda name: name in integers or sections[-1] == name == "Change"
        kinds = {name: {"type": "integer" if whole(name) else "string"} for name in sections}
        schema = {"type": "object", "properties": kinds, "required": list(sections), "additionalProperties": False}
        schema = {"name": "user", "schema": schema, "strict": True}
        return body | {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _doubtful(self, body: dict, content: bytes) -> set[str]:
        """The fields that may be why the server refuses this request: those it names, or else the schema."""
        there = {name for name in self.OPTIONAL if name in body}
        return {name for name in there if name.encode() in content} or there & {"response_format"}


class LocalLLM:
    """Answers a PromptedSimulator's questions with a model in this process, all waiting dialogues in one batch, greedily.

    The sections' headings are written for the model, a section ends at the end of its line, and only a change from -10 to 10
    can be spelled, so that even a small model's answer can be read.
    """

    def __init__(self, model, tokenizer, eager: bool = False, max_section_tokens: int = 48):
        self.model, self.tokenizer, self.eager = model, tokenizer, eager
        self.max_section_tokens = max_section_tokens
        self.name = f"self {model.config.name_or_path}"
        self.waiting = []  # (steps, Future) of turns that wait for `work`
        self.chats = {}  # system prompt -> Chat
        vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.line_ends = [i for i, text in enumerate(vocabulary) if "\n" in text]
        self.changes = [tokenizer(f" {n}\n", add_special_tokens=False)["input_ids"] for n in range(-10, 11)]

    def start(self, steps) -> Future:
        self.waiting.append((steps, Future()))
        return self.waiting[-1][1]

    def work(self) -> None:
        """Take every waiting turn to its end."""
        turns = [(steps, future, None) for steps, future in self.waiting]
        self.waiting = []
        while turns:
            asking = []
            for steps, future, answer in turns:
                try:
                    asking.append((steps, future, steps.send(answer)))
                except StopIteration as end:
                    future.set_result(end.value)
                except Exception as error:
                    future.set_exception(error)
            turns = []
            for sections in dict.fromkeys(question[2] for _, _, question in asking):
                same = [turn for turn in asking if turn[2][2] == sections]
                answers = self._fill([(system, text) for _, _, (system, text, _) in same], sections)
                turns += [(steps, future, answer) for (steps, future, _), answer in zip(same, answers)]

    def _fill(self, questions: list[tuple[str, str]], sections: tuple[str, ...]) -> list[str]:
        prompts = []
        for system, text in questions:
            if system not in self.chats:
                self.chats[system] = Chat(self.tokenizer, system, self.model)
            prompts.append(self.chats[system].opening(text))
        stop_ids = {*self.line_ends, *self.chats[questions[0][0]].stop_ids}
        trunk = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        settings = dict(slots=len(prompts), trunk_ids=prompts[0][:trunk], eager=self.eager)
        generator = Generator(self.model, **settings)
        pieces = [prompt[trunk:] for prompt in prompts]
        answers = [""] * len(prompts)
        for name in sections:
            heading = self.chats[questions[0][0]].text_ids(f"{name}:")
            pieces = [piece + heading for piece in pieces]
            choices = self.changes if name == sections[-1] == "Change" else ()
            written = self._write(generator, pieces, stop_ids, choices)
            for row, ids in enumerate(written):
                text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers[row] += f"{name}: {text}\n"
            # The last token is not in the cache yet. A section that was cut, or ended by a stop token, still ends its line.
            pieces = [ids[-1:] + ([] if ids[-1] in self.line_ends else self.line_ends[:1]) for ids in written]
        return answers

    def _write(self, generator, pieces, stop_ids, choices=()) -> list[list[int]]:
        """Greedy decoding of every row up to a stop id or `max_section_tokens`; with `choices`, until it spells one of them."""
        written = [[] for _ in pieces]
        rows = list(range(len(pieces)))
        while rows:
            logits_B_V = generator.feed(rows, pieces)
            for row, token, logits_V in zip(rows, logits_B_V.argmax(-1).tolist(), logits_B_V):
                ids = written[row]
                if choices:
                    allowed = sorted({c[len(ids)] for c in choices if c[: len(ids)] == ids})
                    token = allowed[int(logits_V[allowed].argmax())]
                ids.append(token)
            ended = lambda ids: ids[-1] in stop_ids or len(ids) == self.max_section_tokens
            rows = [row for row in rows if not (written[row] in choices if choices else ended(written[row]))]
            pieces = [written[row][-1:] for row in rows]
        return written
