import importlib.util
import json
import subprocess
import sys

import pytest

from squeeze.errors import RecipeError
from squeeze.evaluation import TASKS, evaluate


def test_results_are_json_with_their_conditions_in_the_order_asked(pico, tokenizer, text):
    results = evaluate(
        pico, tokenizer, TASKS[::-1], mode="prefill", length=320, limit=2, text=text, batch_size=2
    )
    assert list(results) == ["needle", "books_perplexity"]
    assert json.loads(json.dumps(results)) == results
    for result in results.values():
        assert (result["mode"], result["length"], result["count"]) == ("prefill", 320, 2)
        assert isinstance(result["value"], float)


def test_the_seed_draws_other_facts(pico, tokenizer, text):
    calls = []
    for seed in (0, 1):
        ids = []
        hook = pico.register_forward_pre_hook(
            lambda _, args, kwargs, ids=ids: ids.append(kwargs["input_ids"].tolist()),
            with_kwargs=True,
        )
        evaluate(pico, tokenizer, ["needle"], length=320, limit=1, seed=seed, text=text)
        hook.remove()
        calls.append(ids)
    assert calls[0] != calls[1]


def test_an_unknown_task_without_lm_eval_names_ours_and_the_extra(pico, tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        evaluate(pico, tokenizer, ["needel"])
    assert str(caught.value) == (
        "evaluate.tasks: unknown task 'needel'. Allowed: books_perplexity, needle. Did you mean "
        "'needle'? Tasks of lm-eval need the eval extra: pip install 'squeeze-llm[eval]'."
    )


def test_an_unknown_mode_is_refused_before_any_work(tokenizer):
    with pytest.raises(RecipeError, match="unknown mode 'both'"):
        evaluate(None, tokenizer, mode="both")


def test_importing_the_package_loads_no_lm_eval_and_keeps_submodules_reachable():
    code = (
        "import sys, squeeze.evaluation as e, squeeze.evaluation.needle, "
        "squeeze.evaluation.perplexity\n"
        "assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules\n"
        "assert callable(e.evaluate) and callable(e.needle.needle)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
