import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import squeeze
from squeeze.errors import RecipeError
from squeeze.evaluation import evaluate
from squeeze.evaluation.harness import SqueezeLM, run_tasks
from squeeze.evaluation.tasks import documents

GENERATE = """
task: needle_generate
custom_dataset: !function squeeze.evaluation.tasks.documents.needles
dataset_kwargs: {length: 256, count: 4}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: ['[ ".,]', pounds]
"""
SMALL = """
include: {folder}/{name}.yaml
task: {name}_small
dataset_kwargs: {{length: 128, count: 3}}
"""


def requests(kind, *arguments):
    return [Instance(kind, {}, values, index) for index, values in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_decode_and_prefill_agree_on_a_dense_model(pico, tokenizer, batch_size):
    pairs = [("a b c", " d e"), ("one two three four", " x"), ("a b c", " d f"), ("", " start")]
    answers = {}
    for mode in ("prefill", "decode"):
        adapter = SqueezeLM(pico, mode, tokenizer=tokenizer, batch_size=batch_size)
        likelihoods = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        rolling = adapter.loglikelihood_rolling(
            requests("loglikelihood_rolling", ("some words to roll over",)), disable_tqdm=True
        )
        answers[mode] = ([value for value, _ in likelihoods], rolling)
        assert all(isinstance(greedy, bool) for _, greedy in likelihoods)
    for decode, prefill in zip(answers["decode"], answers["prefill"], strict=True):
        assert decode == pytest.approx(prefill, rel=1e-5)


def test_only_decode_mode_scores_over_the_cache(pico, tokenizer):
    fed = []
    pico.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append("past_key_values" in kwargs), with_kwargs=True
    )
    for mode in ("prefill", "decode"):
        SqueezeLM(pico, mode, tokenizer=tokenizer).loglikelihood(
            requests("loglikelihood", ("a b c", " d e f g")), disable_tqdm=True
        )
    assert fed == [False, False, True]


def test_long_requests_lose_their_beginning_not_their_end(pico, tokenizer):
    adapter = SqueezeLM(pico, "decode", tokenizer=tokenizer, max_length=16)
    long = [(None, list(range(3, 60)), [7, 8])]
    short = [(None, list(range(45, 60)), [7, 8])]
    assert adapter._loglikelihood_tokens(long) == adapter._loglikelihood_tokens(short)


def test_task_files_run_each_kind_of_request(trained, tokenizer, tmp_path):
    names = write_tasks(tmp_path)
    results = run_tasks(trained, tokenizer, names, limit=3, include_path=tmp_path)
    assert list(results) == names
    assert results["needle_small"]["value"] == 1.0
    assert results["needle_generate"]["value"] == 1.0
    books = results["books_perplexity_small"]
    assert (books["metric"], books["mode"], books["count"]) == ("word_perplexity", "decode", 3)
    assert 1.5 < books["metrics"]["byte_perplexity"] < 4


def write_tasks(folder):
    (folder / "generate.yaml").write_text(GENERATE)
    shipped = documents.__file__.rsplit("/", 1)[0]
    for name in ("books_perplexity", "needle"):
        (folder / f"{name}.yaml").write_text(SMALL.format(folder=shipped, name=name))
    return ["needle_small", "books_perplexity_small", "needle_generate"]


@pytest.mark.parametrize("adapter", [HFLM, SqueezeLM])
def test_simple_evaluate_runs_on_a_squeezed_model(adapter, tokenizer, tmp_path):
    result = squeeze.run(
        "kv4", "reference", dtype="float32", evaluate=False,
        overrides={"kv_cache.residual_length": 32},
    )  # fmt: skip
    names = write_tasks(tmp_path)
    output = lm_eval.simple_evaluate(
        model=adapter(pretrained=result.model, tokenizer=tokenizer, batch_size=2),
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        limit=3,
        bootstrap_iters=0,
    )
    assert output["results"]["needle_generate"]["exact_match,none"] == 1.0
    assert output["results"]["needle_small"]["acc,none"] == 1.0
    assert 1.5 < output["results"]["books_perplexity_small"]["byte_perplexity,none"] < 4


def test_evaluate_hands_other_names_over(pico, tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "squeeze.evaluation.harness.run_tasks",
        lambda *args, **options: calls.append((args[2], options)) or {"arc_easy": {"value": 0.5}},
    )
    results = evaluate(pico, tokenizer, ["arc_easy"], mode="prefill", limit=5, seed=2)
    assert results == {"arc_easy": {"value": 0.5}}
    options = {"mode": "prefill", "limit": 5, "batch_size": None, "seed": 2}
    assert calls == [(["arc_easy"], options)]


def test_an_unknown_name_is_refused_with_the_nearest(pico, tokenizer, monkeypatch, tmp_path):
    from squeeze.evaluation import harness

    class OursOnly(harness.TaskManager):
        """Indexing lm-eval's whole collection takes ten seconds."""

        def __init__(self, include_path):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, include_defaults=True: OursOnly(include_path)
    )
    with pytest.raises(RecipeError, match=r"unknown task 'needel'.*Did you mean 'needle'\?"):
        run_tasks(pico, tokenizer, ["needel"])


def test_prompts_hold_their_answer_once_and_end_with_the_question():
    for document in documents.needles(length=256, count=4)["test"]:
        assert document["prompt"].count(document["answer"]) == 1
        assert document["answer"].endswith(document["value"])
    books = documents.books(length=64, count=5)["test"]["text"]
    assert len(set(books)) == 5
    assert {len(passage) for passage in books} == {256}
