"""A judge behind an OpenAI-compatible endpoint: a vision-language model that frames are sent to."""

import base64
import http.client
import io
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from ..pipeline.judge import QuestionAnswer
from ..pipeline.retries import RetryPolicy
from ..schemas.digest import digest_of
from ..schemas.errors import RecipeError, TokenmillError, UnclearError

log = logging.getLogger(__name__)

KEY_VARIABLE = "TOKENMILL_JUDGE_KEY"
POLICY = RetryPolicy(attempts=6, first_wait_s=1, longest_wait_s=30)
TIMEOUT_S = 300
RETRIED = (408, 429, 500, 502, 503, 504)
JPEG_QUALITY = 90
SHOWN = 300  # characters of an answer that an error shows

DESCRIBE = (
    "These are frames of one video, in order. Describe what is to be seen: who and what, where, what they do and in"
    " what order, texts, numbers and colours. Mention details that are in few frames only."
)
ASK = (
    "This describes a video:\n\n{description}\n\nWrite up to five questions that somebody who watches the video can"
    " answer, and others cannot. Each is about something that is to be seen for a short time, and has one short"
    ' answer. Reply with JSON only: [{{"question": "...", "answer": "..."}}]'
)
ANSWER = (
    "Answer the question in a few words, by the frames of the video that are shown, in order, and nothing else. Where"
    ' they do not tell, answer "unknown". Question: {question}\nReply with JSON only: {{"answer": "..."}}'
)
AGREE = (
    "Question: {question}\nRight answer: {wanted}\nGiven answer: {given}\nDoes the given answer mean the same as the"
    ' right one? Reply with JSON only: {{"same": true}} or {{"same": false}}'
)


class OpenAiJudge:
    """Asks the model called `model` at `url` (such as http://localhost:8000/v1), with the key of the environment
    variable TOKENMILL_JUDGE_KEY where there is one.

    Requests are made again after faults that may pass. TokenmillError where the endpoint refuses or is no such
    endpoint, UnclearError where the model says what cannot be understood.
    """

    def __init__(self, url: str, model: str, policy: RetryPolicy = POLICY, timeout_s: float = TIMEOUT_S) -> None:
        if not re.match("https?://", url):
            raise RecipeError(f"judge: found {url!r}; accepted: a URL such as http://localhost:8000/v1")
        self.url = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self.model, self.policy, self.timeout_s = model, policy, timeout_s
        self.name = f"{model}-{digest_of([DESCRIBE, ASK, ANSWER, AGREE, JPEG_QUALITY])[:8]}"

    def describe(self, frames_NHWC: np.ndarray) -> str:
        return self._say(DESCRIBE, frames_NHWC)

    def ask(self, description: str) -> list[QuestionAnswer]:
        said = self._say(ASK.format(description=description))
        found = json_in(said)
        if isinstance(found, dict):  # the list, with a name that was not asked for
            found = next((value for value in found.values() if isinstance(value, list)), [found])
        if not isinstance(found, list):
            raise self._unclear("questions", said)
        pairs = [(one.get("question"), one.get("answer")) for one in found if isinstance(one, dict)]
        return [
            QuestionAnswer(question=question.strip(), answer=str(answer).strip())
            for question, answer in pairs
            if isinstance(question, str) and question.strip() and str(answer or "").strip()
        ]

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        said = self._say(ANSWER.format(question=question), frames_NHWC)
        found = json_in(said)
        if found is None:
            return said  # a plain answer, from a model that does not heed the form
        if not isinstance(found, dict) or not isinstance(found.get("answer"), str | int | float):
            raise self._unclear("an answer", said)
        return str(found["answer"]).strip()

    def agrees(self, question: str, wanted: str, given: str) -> bool:
        if _plain(wanted) == _plain(given):
            return True
        said = self._say(AGREE.format(question=question, wanted=wanted, given=given))
        found = json_in(said)
        same = _plain(str(found.get("same") if isinstance(found, dict) else said)).partition(" ")[0]
        if same not in ("true", "yes", "false", "no"):
            raise self._unclear("true or false", said)
        return same in ("true", "yes")

    def _say(self, text: str, frames_NHWC: np.ndarray | None = None) -> str:
        """What the model says to a text after frames."""
        images = [] if frames_NHWC is None else [_image(frame_HWC) for frame_HWC in frames_NHWC]
        message = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        answer = self._post({"model": self.model, "temperature": 0, "messages": [message]})
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise TokenmillError(
                f"{self.url}: no choices in its answer, found {str(answer)[:SHOWN]}: give the URL of an"
                f" OpenAI-compatible endpoint"
            ) from None
        if not isinstance(said, str) or not said.strip():
            raise self._unclear("a text", str(said))
        return said.strip()

    def _post(self, body: dict[str, Any]) -> Any:
        """The endpoint's answer, asked again after faults that may pass."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        attempt = 1
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    return _parsed(self.url, answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}: {_short(error.read())}"
                if error.code not in RETRIED:
                    remedy = f": set {KEY_VARIABLE} to its key" if error.code in (401, 403) else ""
                    raise TokenmillError(f"{self.url}: the judge refuses, it said {reason}{remedy}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if attempt >= self.policy.attempts:
                raise TokenmillError(f"{self.url}: no answer in {attempt} attempts, at last {reason}")
            wait_s = self.policy.wait_s(attempt)
            log.warning("event=retry attempt=%d wait_s=%.2f request=%r reason=%r", attempt, wait_s, self.url, reason)
            time.sleep(wait_s)
            attempt += 1

    def _unclear(self, wanted: str, said: str) -> UnclearError:
        return UnclearError(f"{self.model}: {wanted} wanted, it said {' '.join(said.split())[:SHOWN]!r}")


def json_in(text: str) -> Any:
    """The first JSON object or list in what a model says, which may stand in other words; None without any."""
    decoder = json.JSONDecoder()
    for begin in (match.start() for match in re.finditer(r"[\[{]", text)):
        try:
            return decoder.raw_decode(text, begin)[0]
        except ValueError:
            continue
    return None


def _parsed(url: str, answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        raise TokenmillError(f"{url}: its answer is not JSON, it said {_short(answer)}") from None


def _short(answer: bytes) -> str:
    return repr(" ".join(answer.decode(errors="replace").split())[:SHOWN])


def _plain(answer: str) -> str:
    """An answer without case and punctuation."""
    return " ".join(re.findall(r"\w+", answer.casefold()))


def _image(frame_HWC: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"},
    }
