"""The judge behind an endpoint, against a server that imitates one: what it sends, reads, repeats and refuses."""

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenmill.jobs import openai_judge
from tokenmill.jobs.openai_judge import KEY_VARIABLE, OpenAiJudge, json_in
from tokenmill.pipeline.judge import Candidates, Judge, QuestionAnswer, Verdicts
from tokenmill.pipeline.label_making import Labeller
from tokenmill.pipeline.retries import RetryPolicy
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import RecipeError, TokenmillError, UnclearError

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001)
FRAMES_NHWC = np.stack([np.full((8, 16, 3), value, np.uint8) for value in (0, 250)])
RED = QuestionAnswer(question="Is anything red?", answer="yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Gives `answers` (status and body, or what to do) in their order, the last one again; keeps what it was sent."""

    url: str
    answers: list[tuple[int, str] | Callable[[], tuple[int, str]]]
    sent: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def says(self, *texts: str | None) -> None:
        """Texts of the model, each in a good answer."""
        self.answers[:] = [(200, json.dumps({"choices": [{"message": {"content": text}}]})) for text in texts]

    def judge(self, **settings: Any) -> OpenAiJudge:
        return OpenAiJudge(self.url, "model-7b", QUICK, **settings)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            found.headers.append(dict(self.headers))
            found.paths.append(self.path)
            answer = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            status, body = answer() if callable(answer) else answer
            with contextlib.suppress(ConnectionError):  # who asked has given up
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", answers=[])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        server.shutdown()


def test_frames_are_sent_as_pictures_in_their_order(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    endpoint.says("  A dark frame, then a bright one.\n")
    judge = endpoint.judge()
    assert isinstance(judge, Judge)
    assert judge.describe(FRAMES_NHWC) == "A dark frame, then a bright one."
    (sent,) = endpoint.sent
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert (sent["model"], sent["temperature"]) == ("model-7b", 0)
    ((role, content),) = [(message["role"], message["content"]) for message in sent["messages"]]
    assert role == "user"
    assert content[-1] == {"type": "text", "text": openai_judge.DESCRIBE}
    for part, frame_HWC in zip(content[:-1], FRAMES_NHWC, strict=True):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        shown_HWC = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.abs(shown_HWC.astype(int) - frame_HWC).max() <= 2


def test_without_a_key_none_is_sent_and_without_frames_no_pictures(endpoint: Endpoint) -> None:
    endpoint.says('{"answer": "unknown"}')
    assert endpoint.judge().answer(FRAMES_NHWC[:0], RED.question) == "unknown"
    assert "Authorization" not in endpoint.headers[0]
    (part,) = endpoint.sent[0]["messages"][0]["content"]
    assert RED.question in part["text"]


@pytest.mark.parametrize(
    ("said", "questions"),
    [
        ('[{"question": "Who?", "answer": "A dog"}]', [("Who?", "A dog")]),
        ('Sure!\n```json\n[{"question": " Who? ", "answer": 7}]\n```', [("Who?", "7")]),
        ('{"questions": [{"question": "Who?", "answer": "A dog"}]}', [("Who?", "A dog")]),
        ('{"question": "Who?", "answer": "A dog"}', [("Who?", "A dog")]),
        ('[{"question": "Who?"}, {"answer": "A"}, "Who?", {"question": "", "answer": "A"}]', []),
        ("[]", []),
    ],
)
def test_questions_are_read_leniently(endpoint: Endpoint, said: str, questions: list[tuple[str, str]]) -> None:
    endpoint.says(said)
    asked = endpoint.judge().ask("A {dog} sits.")
    assert [(one.question, one.answer) for one in asked] == questions
    assert "A {dog} sits." in endpoint.sent[0]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("said", "answer"),
    [('{"answer": " A dog "}', "A dog"), ('I think {"answer": 3}.', "3"), ("A dog", "A dog"), ("{A dog", "{A dog")],
)
def test_answers_are_read_leniently(endpoint: Endpoint, said: str, answer: str) -> None:
    endpoint.says(said)
    assert endpoint.judge().answer(FRAMES_NHWC, "Who?") == answer


@pytest.mark.parametrize(
    ("said", "same"),
    [('{"same": true}', True), ('```{"same": "False"}```', False), ("Yes, it does.", True), ("no", False)],
)
def test_whether_answers_agree_is_asked_where_their_words_differ(endpoint: Endpoint, said: str, same: bool) -> None:
    endpoint.says(said)
    assert endpoint.judge().agrees("Who?", "A dog", "a DOG!") is True
    assert endpoint.sent == []
    assert endpoint.judge().agrees("Who?", "A dog", "A puppy") is same
    text = endpoint.sent[0]["messages"][0]["content"][0]["text"]
    assert all(part in text for part in ("Who?", "A dog", "A puppy"))


@pytest.mark.parametrize(
    ("step", "said", "told"),
    [
        ("ask", "I cannot see any [ video {", "model-7b: questions wanted, it said 'I cannot see any"),
        ("answer", '{"answ": "A dog"}', 'an answer wanted, it said \'{"answ": "A dog"}\''),
        ("answer", '{"answer": null}', "an answer wanted"),
        ("agrees", "perhaps", "true or false wanted, it said 'perhaps'"),
        ("agrees", '{"equal": true}', "true or false wanted"),
        ("describe", " ", "a text wanted"),
        ("describe", None, "a text wanted, it said 'None'"),
    ],
)
def test_nonsense_is_told_and_may_be_asked_for_again(endpoint: Endpoint, step: str, said: str, told: str) -> None:
    endpoint.says(said)
    arguments = {
        "ask": ("A dog.",),
        "answer": (FRAMES_NHWC, "Who?"),
        "agrees": ("Who?", "A dog", "A cat"),
        "describe": (FRAMES_NHWC,),
    }
    with pytest.raises(UnclearError, match=told):
        getattr(endpoint.judge(), step)(*arguments[step])
    assert len(endpoint.sent) == 1


@pytest.mark.parametrize("fault", [(500, "out of memory"), (503, ""), (429, "slow down")])
def test_a_fault_that_passes_is_survived(endpoint: Endpoint, fault: tuple[int, str]) -> None:
    endpoint.says("a dog")
    endpoint.answers[:0] = [fault, fault]
    assert endpoint.judge().describe(FRAMES_NHWC) == "a dog"
    assert len(endpoint.sent) == 3
    assert endpoint.sent[0] == endpoint.sent[2]


def test_a_slow_answer_is_given_up_and_asked_for_again(endpoint: Endpoint) -> None:
    done = threading.Event()

    def too_slow() -> tuple[int, str]:
        done.wait(10)
        return 500, ""

    endpoint.says("a dog")
    endpoint.answers.insert(0, too_slow)
    assert endpoint.judge(timeout_s=0.3).describe(FRAMES_NHWC) == "a dog"
    done.set()


def test_a_lasting_fault_is_told_with_what_the_endpoint_said(endpoint: Endpoint) -> None:
    endpoint.answers[:] = [(500, "out  of\nmemory")]
    with pytest.raises(TokenmillError, match="no answer in 3 attempts, at last HTTP 500: 'out of memory'"):
        endpoint.judge().describe(FRAMES_NHWC)
    assert len(endpoint.sent) == 3


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((401, '{"error": "no such key"}'), "refuses, it said HTTP 401: .*no such key.*: set TOKENMILL_JUDGE_KEY"),
        ((400, "too many images"), r"/v1/chat/completions: the judge refuses, it said HTTP 400: 'too many images'$"),
        ((200, "<html>Welcome</html>"), "its answer is not JSON, it said '<html>Welcome</html>'"),
        ((200, '{"models": []}'), "no choices in its answer, found {'models': .*OpenAI-compatible"),
        ((200, "[]"), "no choices in its answer"),
    ],
)
def test_a_refusal_is_told_at_once(endpoint: Endpoint, answer: tuple[int, str], told: str) -> None:
    endpoint.answers[:] = [answer]
    with pytest.raises(TokenmillError, match=told):
        endpoint.judge().describe(FRAMES_NHWC)
    assert len(endpoint.sent) == 1


def test_nobody_there_is_told() -> None:
    judge = OpenAiJudge("http://127.0.0.1:9/v1/chat/completions", "model-7b", QUICK)
    assert judge.url == "http://127.0.0.1:9/v1/chat/completions"
    with pytest.raises(TokenmillError, match=r"no answer in 3 attempts, at last .*refused"):
        judge.describe(FRAMES_NHWC)
    with pytest.raises(RecipeError, match="judge: found 'localhost:8000'; accepted: a URL such as"):
        OpenAiJudge("localhost:8000", "model-7b")


def test_a_judge_with_other_prompts_has_another_name(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    name = endpoint.judge().name
    assert name.startswith("model-7b-")
    assert endpoint.judge().name == name
    monkeypatch.setattr(openai_judge, "ASK", "Ask.")
    assert endpoint.judge().name != name


@pytest.mark.parametrize(
    ("text", "found"),
    [("[1, 2", None), ("a {b} [1]", [1]), ('x {"a": [1]} {"b": 2}', {"a": [1]}), ("", None), ("7", None)],
)
def test_the_first_object_or_list_of_a_text_is_found(text: str, found: object) -> None:
    assert json_in(text) == found


def test_a_question_is_labelled_through_an_endpoint(endpoint: Endpoint) -> None:
    endpoint.says('{"answer": "yes"}', '{"answer": "no"}', '{"same": false}', '{"answer": "Yes."}', "unknown", "No.")
    candidates = Candidates(video_id="v", places=(("clip", 0), ("clip", 1)), read=lambda: FRAMES_NHWC)
    verdicts = Verdicts(Folder("memory:///endpoint"), endpoint.judge())
    (outcome,) = Labeller(verdicts).label_questions(candidates, [RED])
    assert (outcome.fate, outcome.needed) == ("kept", (1,))
    num_pictures = [len(one["messages"][0]["content"]) - 1 for one in endpoint.sent]
    assert num_pictures == [2, 1, 0, 1, 1, 0]  # the answers of all, of either, and of the other; what differs is asked
