"""The model class of lm-evaluation-harness, through the harness, on tasks in local files."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import published
import tiny
from unveil.cli.lm_eval import UnveilLM, _cut
from unveil.learning.elbo import elbo
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.tasks.countdown import Countdown

GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [","], max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: local_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[answer, other]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLL = """
task: local_roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three tasks over eight Countdown problems: first step, right against wrong answer, perplexity of prompts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for problem in Countdown().problems("test", 8, 0):
        wrong = str(problem.solution).rpartition(" ")[0] + " 1"
        rows.append({"prompt": problem.prompt, "answer": problem.solution, "other": wrong})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generate", GENERATE), ("choose", CHOOSE), ("roll", ROLL)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def evaluated(folder: Path, names: list[str], model_args: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    told = simple_evaluate(
        model="unveil", model_args=model_args, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert told is not None
    return told


def test_through_the_harness_with_an_embedded_model(tasks: Path) -> None:
    names = ["local_generate", "local_choose", "local_roll"]
    told = evaluated(tasks, names, "path=countdown-base,length=12,steps=12,rule=rcr:running=max,mc=16")
    results, samples = told["results"], told["samples"]
    for sample in samples["local_generate"]:
        (answer,) = sample["resps"][0]
        assert answer and "," not in answer and " = " in answer
    # The base has learned what solutions look like: the right last number is likelier than 1.
    assert results["local_choose"]["acc,none"] >= 6 / 8
    assert 1 < results["local_roll"]["word_perplexity,none"] < math.inf
    model = UnveilLM(path="countdown-base", mc=16)
    first = samples["local_choose"][0]
    (bound,) = elbo(
        model.denoiser, [model.denoiser.encode_prompt(first["doc"]["prompt"])],
        [model.denoiser.tokenizer.encode(" " + first["doc"]["answer"])], draws=16,
    )  # fmt: skip
    assert float(first["resps"][0][0][0]) == pytest.approx(bound.value, abs=1e-4)


def test_through_the_harness_with_a_published_format(tasks: Path, tmp_path: Path) -> None:
    folder = published.write(tmp_path / "llada", "llada")
    told = evaluated(tasks, ["local_generate", "local_choose"], f"pretrained={folder},length=8,steps=4,mc=4,chat=true")
    assert len(told["samples"]["local_generate"]) == 8
    assert all(isinstance(sample["resps"][0][0], str) for sample in told["samples"]["local_generate"])
    assert 0 <= told["results"]["local_choose"]["acc,none"] <= 1


@pytest.mark.slow
def test_the_harness_s_command_line(tasks: Path) -> None:
    command = [
        sys.executable, "-m", "unveil.cli.lm_eval", "--model", "unveil", "--model_args", "path=countdown-base,steps=6",
        "--tasks", str(tasks / "generate.yaml"), "--batch_size", "4",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "local_generate" in done.stdout and "exact_match" in done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UnveilLM:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.denoiser(scale=4.0).save_pretrained(folder)
    return UnveilLM(path=str(folder), length=5, mc=31, batch_size=3, temperature=1.0)


def test_answers_depend_on_context_and_repetition_alone(model: UnveilLM) -> None:
    how = {"until": []}
    requests = [asked("generate_until", text, how) for text in ("a b", "c", "a b", "d d d", "a b")]
    answers = model.generate_until(requests)
    assert len({answers[0], answers[2], answers[4]}) > 1
    assert model.generate_until(requests[1:2]) == answers[1:2]
    assert model.generate_until([requests[0], requests[3], requests[2]]) == [answers[0], answers[3], answers[2]]
    cold = model.generate_until([asked("generate_until", "a b", {"do_sample": True, "temperature": 0.0})] * 2)
    assert cold[0] == cold[1]


def test_lengths_come_from_the_task_unless_given(model: UnveilLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "length", None)
    requests = [asked("generate_until", "a", {"max_gen_toks": count}) for count in (2, 7, 2)]
    words = [len(text.split()) for text in model.generate_until(requests)]
    assert words[0] <= 2 and words[2] <= 2 and words[1] <= 7
    with pytest.raises(UserError, match="256 tokens do not fit"):
        model.generate_until([asked("generate_until", "a", {})])


def test_stop_strings() -> None:
    assert _cut("12 + 7 = 19 , 19 * 3", [",", "="]) == "12 + 7 "
    assert _cut("a\n\nb", "\n\n") == "a" and _cut("a", None) == "a" and _cut("ab", ["", "b"]) == "a"


def test_a_network_of_scores_has_a_bound_too() -> None:
    model = UnveilLM(path="sudoku-sedd", check_greedy=False, mc=8)
    ((bound, greedy),) = model.loglikelihood([asked("loglikelihood", "2 0 1 0 0 0 2 4 4 0 0 1 1 3 0 0", " 2 4 1 3")])
    assert -math.inf < bound < 0 and greedy is False


def test_greedy_is_what_greedy_decoding_gives(model: UnveilLM) -> None:
    net, prompt = model.denoiser, model.denoiser.encode_prompt("a b")
    for size in (1, 3):
        canvas = Canvas.of([prompt], size, net.spec)
        made = MaskedSampler(steps=size).sample(net, canvas, [0]).response_ids[0].tolist()
        assert model._is_greedy(prompt, made)
        for token in set(net.tokenizer.encode("a b c d")) - {made[-1]}:
            assert not model._is_greedy(prompt, [*made[:-1], token])
    found = model.loglikelihood([asked("loglikelihood", "a b", f" {word}") for word in tiny.WORDS])
    assert sum(greedy for _, greedy in found) <= 1 and all(-math.inf < bound < 0 for bound, _ in found)
    best = max(found)
    assert not any(greedy for bound, greedy in found if bound < best[0])


def test_spaces_belong_to_the_continuation(model: UnveilLM) -> None:
    assert model._pair("a b ", "c") == model._pair("a b", " c")
    assert model._pair("", "a b")[1] == model.denoiser.tokenizer.encode("a b")


def test_long_contexts_are_cut_on_the_left_and_long_texts_into_windows(
    model: UnveilLM, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["a", "b", "c", "d"] * 5  # a canvas of 16 tokens
    with caplog.at_level(logging.WARNING):
        prompt, answer = model._pair(" ".join(words), " c")
    assert (len(prompt), len(answer)) == (15, 1) and "is cut to its last 15" in caplog.text
    assert prompt == model.denoiser.tokenizer.encode(" ".join(words))[-15:]
    parts = [" ".join(words[:16]), " ".join(words[16:])]
    whole, *single = model.loglikelihood_rolling(
        [asked("loglikelihood_rolling", text) for text in (" ".join(words), *parts)]
    )
    assert whole == pytest.approx(sum(single), abs=1e-4) and whole < 0


def test_chat_is_one_turn_of_the_user(tmp_path: Path) -> None:
    folder = published.write(tmp_path / "llada", "llada")
    model = UnveilLM(path=str(folder), chat=True, length=4)
    turn = {"role": "user", "content": "2+2"}
    assert model.apply_chat_template([{"role": "system", "content": "be brief"}, turn]) == "be brief\n\n2+2"
    assert model.chat_template() and "/" not in model.tokenizer_name
    with pytest.raises(UserError, match="one turn of the user"):
        model.apply_chat_template([turn, {"role": "assistant", "content": "4"}, turn])
    with pytest.raises(UserError, match="chat=true"):
        UnveilLM(path=str(folder)).apply_chat_template([turn])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stpes=4", "no argument is called 'stpes', did you mean 'steps'?"),
        ("rule=rrc", "no rule is called 'rrc', did you mean 'rcr'?"),
        ("length=6,steps=7", "model_args: steps: 7 do not fit a response of 6 tokens"),
        ("mc=0", "mc should be at least 1"),
        ("batch_size=auto", "batch_size: should be a number, got 'auto'"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        UnveilLM.create_from_arg_string(f"path=countdown-base,{arguments}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="check_greedy: should be false for this model"):
        UnveilLM(path="sudoku-sedd")
    with pytest.raises(UserError, match="path is required"):
        UnveilLM.create_from_arg_string("")
