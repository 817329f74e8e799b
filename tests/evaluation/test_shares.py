"""Two processes that split an evaluation report what one does."""

import pytest

import squeeze
import tests.parallel as parallel
from squeeze import processes
from squeeze.evaluation import evaluate
from squeeze.evaluation.harness import run_tasks
from squeeze.evaluation.shares import in_shares
from tests.evaluation.test_harness import write_tasks

TASKS = {
    "books_perplexity": {"limit": 5, "length": 64, "batch_size": 2},
    "needle": {"limit": 10, "length": 320},
}
OF_LM_EVAL = ["needle_small", "books_perplexity_small", "needle_generate"]


def run(task, model, tokenizer, mode, folder=None):
    """Evaluate; also count the tokens that the model was fed."""
    fed = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs.get("input_ids", args[0] if args else None)),
        with_kwargs=True,
    )
    if folder is None:
        results = evaluate(model, tokenizer, [task], mode=mode, **TASKS[task])
    else:
        results = run_tasks(model, tokenizer, [task], mode=mode, include_path=folder, limit=3)
    hook.remove()
    return results, sum(ids.numel() for ids in fed)


def check_shared(task, model, tokenizer, mode, folder, expected, tokens):
    results, own = run(task, model, tokenizer, mode, folder)
    assert results == expected
    assert 0.2 * tokens < own < 0.8 * tokens
    assert sum(processes.gather([own])) == tokens


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("task", ["books_perplexity", "needle"])
def test_our_tasks(task, mode, pico, tokenizer, tmp_path):
    expected, tokens = run(task, pico, tokenizer, mode)
    work = (task, pico, tokenizer, mode, None, expected, tokens)
    parallel.together(tmp_path / "meeting", check_shared, *work)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("task", OF_LM_EVAL)
def test_tasks_of_lm_eval(task, mode, pico, tokenizer, tmp_path):
    write_tasks(tmp_path)
    expected, tokens = run(task, pico, tokenizer, mode, tmp_path)
    work = (task, pico, tokenizer, mode, tmp_path, expected, tokens)
    parallel.together(tmp_path / "meeting", check_shared, *work)


def check_empty(model):
    found = in_shares(model, ["a"], lambda items: [item * 2 for item in items])
    assert found == ["aa"]
    assert in_shares(model, [], list) == []


def test_fewer_requests_than_processes(pico, tmp_path):
    parallel.together(tmp_path / "meeting", check_empty, pico)


def check_split(folder, expected, tokens):
    model = squeeze.load(folder / "squeezed", tp_plan="auto")
    tokenizer = squeeze.load_tokenizer(folder / "squeezed")
    results, own = run("books_perplexity", model, tokenizer, "decode")
    assert own == tokens  # both processes work on every request, each on its heads
    assert results["books_perplexity"]["value"] == pytest.approx(
        expected["books_perplexity"]["value"], rel=1e-4
    )


def test_a_model_that_is_split_answers_everything_together(tmp_path):
    result = parallel.save(tmp_path, "llama")
    expected, tokens = run("books_perplexity", result.model, result.tokenizer, "decode")
    parallel.together(tmp_path / "meeting", check_split, tmp_path, expected, tokens)
