"""Trajectories: turns of the policy, between which an environment answers; token ids from end to end.

What was sampled stays as it is: no text is ever made ids again. What the environment says, and what the chat template
writes round it, is encoded once, and stands behind what was sampled: seen, and not learnt. Turn after turn, all that
are still under way are one call of the engine.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ringbpt.config import RolloutConfig, UserError, printable
from ringbpt.data.text.chat import ChatTemplate
from ringbpt.data.text.shapes import Message, check_messages, settings_of, tools_of
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.processes import told
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.rollout.process import Process
from ringbpt.rollout.rewards import Say, check_failures

FLAG = "rollout.environment"
SAID = "placeholder"  # what the policy has said, as the template sees it
NOTHING = np.zeros(0, np.int32)


class Template:
    """A tokenizer's chat template, by what it writes behind a conversation as it goes on."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises UserError where nobody can tell a turn's end from what is said."""
        if not tokenizer.chat_template:
            flag = "--train_dataset.text_processor.chat_template=chatml"
            raise UserError(f"--{FLAG} holds conversations, and the tokenizer has no chat template for them: {flag}")
        self._tokenizer, self._template = tokenizer, ChatTemplate.of(tokenizer, "", FLAG)
        self._end = self._template.turn_end(tokenizer)
        if self._end is None:
            raise UserError(
                f"--{FLAG}: by the chat template no special token of the tokenizer ({tokenizer.describe()}) ends a "
                "turn, so that nobody knows where one does: --tokenizer.vocab_file of a chat model has such a token"
            )

    def prompt(self, messages: list[Message], given: tuple[Any, Any], where: str) -> str:
        """The text up to where the policy begins. given: tools and settings, see ChatTemplate."""
        return self._template.prompt(messages, given[0], where, given[1])

    def encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode_places(text, special=True).ids

    def goes_on(self, text: str, messages: list[Message], given: tuple[Any, Any], where: str) -> tuple[str, np.ndarray]:
        """(the text of the messages, the ids of what of it stands behind the end of the policy's last turn).

        text: up to where that turn began; messages: with it, SAID, and what follows. Raises UserError where the
        template makes something else of what was there before.
        """
        whole = self.prompt(messages, given, where)
        end = self._tokenizer.name(self._end or 0)
        turn = re.match(rf"\s*{SAID}\s*{re.escape(end)}", whole[len(text) :])
        if not turn or not whole.startswith(text):
            raise UserError(
                f"{where}: the chat template rewrites earlier turns once others follow, and what was sampled stays as "
                "it is: --train_dataset.text_processor.chat_template=chatml does not, nor does a .jinja file that "
                f"writes each message by itself and {end} behind it"
            )
        ids = self.encode(end + whole[len(text) + turn.end() :])  # as it reads behind the end
        return whole, ids[np.flatnonzero(ids == self._end)[0] + 1 :]

    def check(self, messages: list[Message], given: tuple[Any, Any]) -> None:
        """Raises UserError for a template by which no conversation goes on, neither by a tool's nor a user's turn."""
        text, where = self.prompt(messages, given, f"--{FLAG}"), f"--{FLAG}"
        said = {"role": "assistant", "content": SAID}
        try:
            self.goes_on(text, [*messages, said, {"role": "tool", "content": SAID}], given, where)
        except UserError:  # a template may know no tools
            self.goes_on(text, [*messages, said, {"role": "user", "content": SAID}], given, where)


@dataclass
class Trajectory:
    """One under way. tokens, logps, drawn: behind the prompt, see Sample. over: why it is, empty while it is not.

    messages: as the environment sees them; shown: as the template does, with SAID for each turn, and text, what it has
    written of these. What only process 0 needs is not there in the others.
    """

    row: dict[str, Any]
    prompt: np.ndarray
    messages: list[Message]
    shown: list[Message]
    text: str
    given: tuple[Any, Any]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    finish: str = ""
    turns: int = 0
    reward: float = 0.0
    over: str = ""

    def add(self, tokens: Sequence[int], logps: Sequence[float], drawn: bool) -> None:
        self.tokens += [int(token) for token in tokens]
        self.logps += logps
        self.drawn += [drawn] * len(tokens)

    @property
    def asked(self) -> np.ndarray:
        """What the next turn goes on from; nothing where there is none."""
        return NOTHING if self.over else np.concatenate([self.prompt, self.tokens]).astype(np.int32)


@dataclass(frozen=True)
class First:
    """How an environment begins with a row of the file."""

    messages: list[Message]
    text: str
    given: tuple[Any, Any]


class Episodes:
    """Plays an environment, FILE.py:NAME, with an engine; see docs/post_training.md for what an environment is."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer, say: Say = print):
        """Raises UserError for an environment that cannot be had, and a tokenizer or template that it cannot go by."""
        self._config, self._tokenizer, self._say = config, tokenizer, say
        self._template = Template(tokenizer)
        self._process = None
        if jax.process_index() == 0:
            self._process = Process(FLAG, config.environment, "environment", config.reward_timeout)
        self._where = f"--{FLAG}={config.environment}"
        self._first: list[First] = []
        # Servers are asked by process 0 alone, on a thread of its own: nobody else plays.
        self._told: Callable[[Any], Any] = (lambda replies: replies) if config.servers else told

    def begin(self, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The tokens of how the environment begins with each row. Raises UserError for the first that it cannot."""
        if self._process:
            found = self._process.ask([{"id": 0, "row": row} for row in rows])
            for number, (row, begun) in enumerate(zip(rows, found, strict=True), 1):
                where = f"{self._where}, prompt {number}"
                messages, given = _begun(begun, row, where)
                self._first.append(First(messages, self._template.prompt(messages, given, where), given))
            self._template.check(self._first[0].messages, self._first[0].given)
        return [np.array(ids, np.int32) for ids in told([self._template.encode(f.text).tolist() for f in self._first])]

    def play(
        self,
        engine: LocalEngine | HttpEngine,
        numbers: Sequence[int],
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[np.ndarray],
        room: int,
        seed: Callable[[int], int],
    ) -> tuple[list[list[Sample]], np.ndarray, dict[str, float]]:
        """(samples of each prompt, rewards float64 [prompts, samples] with NaN where one has failed, what is known).

        numbers: the prompts', as rows of `begin`. room: tokens of a trajectory, at most. seed(turn): what it is drawn
        by. Raises UserError, code 3, where too many have failed.
        """
        config, each = self._config, self._config.samples_per_prompt
        players = self._started([x for x in zip(numbers, rows, prompts, strict=True) for _ in range(each)])
        answered = engine.generate(prompts, each, config.temperature, seed(0))
        samples: list[Sample | None] = [sample for answers in answered for sample in answers]
        for turn in range(1, config.max_turns + 1):
            replies = self._replies(players, samples, room) if self._process else [{}] * len(players)
            for player, sample, reply in zip(players, samples, self._told(replies), strict=True):
                if sample:
                    _heard(player, sample, reply)
            if all(player.over for player in players):
                break
            asked = [player.asked for player in players]
            samples = [a[0] if a else None for a in engine.generate(asked, 1, config.temperature, seed(turn))]
        reward_PR = np.array([player.reward for player in players]).reshape(len(prompts), each)
        check_failures(self._where, "trajectories", reward_PR, config.reward_failures)
        found = [Sample(p.tokens, p.logps, p.finish, p.drawn) for p in players]
        facts = {
            "rollout/turns": float(np.mean([player.turns for player in players])),
            "rollout/out_of_turns": float(np.mean([player.over == "turns" for player in players])),
            "rollout/too_long": float(np.mean([player.over == "room" for player in players])),
        }
        return [found[at : at + each] for at in range(0, len(found), each)], reward_PR, facts

    def _started(self, whole: Sequence[tuple[int, dict[str, Any], np.ndarray]]) -> list[Trajectory]:
        """Of each (number, row, prompt) one. Those that have failed already are sampled once with the others."""
        if not self._process:
            return [Trajectory(row, prompt, [], [], "", (None, None)) for _, row, prompt in whole]
        found = self._process.ask([{"id": id, "row": row} for id, (_, row, _) in enumerate(whole)])
        players = []
        for (number, row, prompt), begun in zip(whole, found, strict=True):
            first = self._first[number]
            player = Trajectory(row, prompt, [*first.messages], [*first.messages], first.text, first.given)
            try:
                if _begun(begun, row, self._where) != (first.messages, first.given):
                    raise UserError(f"{self._where}: it begins with a row otherwise than it did before")
            except UserError as error:
                player.reward = self._failed(str(error))["reward"]
            players.append(player)
        return players

    def _replies(self, players: list[Trajectory], samples: list[Sample | None], room: int) -> list[dict[str, Any]]:
        """To each turn: what it has earned, and the ids of what the next one goes on from, or why there is none."""
        assert self._process is not None
        replies, asked = [dict[str, Any]() for _ in players], list[int]()
        for id, (player, sample) in enumerate(zip(players, samples, strict=True)):
            if sample and sample.finish == "length":
                replies[id] = {"over": "length"}
            elif sample and math.isnan(player.reward):
                replies[id] = {"over": "failed"}
            elif sample:  # a call may be marked by special tokens
                text = self._tokenizer.decode(sample.said, special=True)
                player.messages.append({"role": "assistant", "content": text})
                asked.append(id)
        found = self._process.ask(
            [{"id": id, "row": players[id].row, "messages": players[id].messages} for id in asked]
        )
        for id, said in zip(asked, found, strict=True):
            replies[id] = self._reply(players[id], samples[id], said, room)
        return replies

    def _reply(self, player: Trajectory, sample: Sample | None, said: dict[str, Any], room: int) -> dict[str, Any]:
        if "error" in said:
            return self._failed(f"{self._where}: {said['error']}")
        if said["done"]:
            return {"over": "done", "reward": said["reward"]}
        if player.turns + 1 == self._config.max_turns:
            return {"over": "turns", "reward": said["reward"]}
        try:
            more = _messages(said["messages"], self._where)
            player.shown += [{"role": "assistant", "content": SAID}, *more]
            player.text, ids = self._template.goes_on(player.text, player.shown, player.given, self._where)
        except UserError as error:
            return self._failed(str(error))
        player.messages += more
        sampled = len(sample.tokens) if sample else 0
        if len(player.tokens) + sampled + len(ids) + self._config.max_new_tokens > room:
            return {"over": "room", "reward": said["reward"]}
        return {"tokens": ids.tolist(), "reward": said["reward"]}

    def _failed(self, why: str) -> dict[str, Any]:
        self._say(printable(why))
        return {"over": "failed", "reward": math.nan}

    def close(self) -> None:
        if self._process:
            self._process.close()


def _heard(player: Trajectory, sample: Sample, reply: dict[str, Any]) -> None:
    player.add(sample.tokens, sample.logps, drawn=True)
    player.turns, player.finish = player.turns + 1, sample.finish
    player.reward += reply.get("reward", 0.0)
    player.over = reply.get("over", "")
    ids = reply.get("tokens", [])
    player.add(ids, [0.0] * len(ids), drawn=False)


def _begun(found: dict[str, Any], row: dict[str, Any], where: str) -> tuple[list[Message], tuple[Any, Any]]:
    """(the messages that an environment begins with, tools and settings for the template)."""
    if "error" in found:
        raise UserError(f"{where}: {printable(found['error'])}")
    tools = {"tools": found["tools"]} if found["tools"] else {}
    return _messages(found["messages"], where), (tools_of(row | tools, where), settings_of(row, where))


def _messages(found: Any, where: str) -> list[Message]:
    """What an environment says, as messages. Raises UserError for what is none, and for what the policy says."""
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: it is not done, and what it says is no list of messages")
    messages = check_messages(found, "messages", where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: its last message is the assistant's, whose turn it is")
    return messages
