"""The command line in process: results, JSON, exit codes and the text of errors."""

import json
import re

import pytest
from click.testing import CliRunner

import tests.pico
from squeeze import registry
from squeeze.cli import main
from squeeze.cli._progress import progress
from squeeze.recipe import shipped

COMMANDS = [
    *("bench", "compare", "doctor", "eval", "export", "generate"),
    *("inspect", "ls", "plan", "run", "schema"),
]
SMALL = [
    argument
    for path, value in {**tests.pico.SETTINGS, "kv_cache.residual_length": 16}.items()
    for argument in ("--set", f"{path}={json.dumps(value)}")
]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments):
    """Run a command that must succeed, and return its standard output."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(*arguments):
    """Run a command that must fail by the user's mistake, and return its one paragraph."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return tests.pico.save(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def squeezed(pico, tmp_path_factory):
    """The folder that ``squeeze run kv4`` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("out") / "squeezed"
    printed = succeed("run", "kv4", "--model", pico, "--output", folder, "--json", *SMALL)
    return folder, json.loads(printed)


def test_help_names_every_command():
    text = succeed("--help")
    assert re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], re.M) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_debug(name):
    text = succeed(name, "--help")
    assert "--json" in text
    assert "--debug" in text


def test_an_unknown_command_is_a_usage_error():
    result = invoke("squash")
    assert result.exit_code == 2
    assert "No such command 'squash'" in result.stderr


def test_version_is_a_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", succeed("--version"))


def test_plan_prints_a_table_or_json():
    assert "effective bits" in succeed("plan", "kv4")
    data = json.loads(succeed("plan", "kv4", "--json", "--context", 4096, "--batch", 2))
    assert (data["context"], data["batch"]) == (4096, 2)
    assert 4 < data["effective_bits"]["keys"] <= 4.5
    assert data["kv_bytes"]["after"] < data["kv_bytes"]["before"]


def test_set_overrides_a_recipe_value():
    before = json.loads(succeed("plan", "kv4", "--json"))
    after = json.loads(succeed("plan", "kv4", "--json", "--set", "kv_cache.keys.bits=8"))
    rise = after["effective_bits"]["keys"] - before["effective_bits"]["keys"]
    assert rise == pytest.approx(4.0)


def test_ls_shows_every_method_and_recipe():
    found = json.loads(succeed("ls", "--json"))
    assert set(found) == {*registry.KINDS, "recipes"}
    for kind in registry.KINDS:
        assert [row["name"] for row in found[kind]] == registry.names(kind)
        assert all(row["idea"] and row["source"].startswith("http") for row in found[kind])
    assert [row["name"] for row in found["recipes"]] == list(shipped())
    text = succeed("ls", "kv")
    assert "affine" in text
    assert "group_size" in text
    assert "vertical_slash" not in text


def test_schema_allows_what_the_recipe_reader_allows():
    schema = json.loads(succeed("schema"))
    assert {"version", "weights", "kv_cache", "attention"} <= set(schema["properties"])


def test_doctor_says_what_each_op_would_take():
    found = json.loads(succeed("doctor", "--json", "--device", "cpu"))
    assert {"decode_attention", "lut_linear", "block_sparse_attention"} <= set(found["operations"])
    assert all(choice.startswith("reference") for choice in found["operations"].values())
    assert "torch" in succeed("doctor")


def test_run_writes_a_checkpoint_and_prints_the_report(squeezed):
    folder, printed = squeezed
    report = json.loads((folder / "report.json").read_text())
    assert printed["report"] == report
    assert printed["output"] == str(folder)
    assert report["squeezed"]["kv_bytes_per_token"] < report["dense"]["kv_bytes_per_token"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_run_refuses_a_finished_folder_and_overwrites_on_request(squeezed, pico):
    folder, _ = squeezed
    message = fail("run", "kv4", "--model", pico, "--output", folder)
    assert str(folder) in message
    assert "--overwrite" in message
    text = succeed("run", "kv4", "--model", pico, "--output", folder, "--overwrite", *SMALL)
    assert f"Written to {folder}" in text


def test_run_without_evaluation_prints_the_plan(pico):
    result = invoke("run", "kv4", "--model", pico, "--no-evaluate", "--quiet")
    assert result.exit_code == 0
    assert "effective bits" in result.stdout
    printed = json.loads(succeed("run", "kv4", "--model", pico, "--no-evaluate", "--json"))
    assert printed["report"] is None
    assert printed["output"] is None


def test_generate_prints_text_and_counts(squeezed, tmp_path):
    folder, _ = squeezed
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It was a bright cold day")
    options = ("--max-new-tokens", 5, "--json")
    found = json.loads(succeed("generate", folder, "--file", prompt, *options))
    assert found["prompt"] == "It was a bright cold day"
    assert 1 <= found["new_tokens"] <= 5
    assert found["kv_bytes"] > 0
    again = json.loads(succeed("generate", folder, "--prompt", found["prompt"], *options))
    assert again["text"] == found["text"]
    sampled = ("--temperature", 0.9, "--top-p", 0.9, "--seed", 3, *options)
    texts = [json.loads(succeed("generate", folder, "--file", prompt, *sampled)) for _ in range(2)]
    assert texts[0]["text"] == texts[1]["text"]


def test_generate_wants_exactly_one_text(squeezed, tmp_path):
    folder, _ = squeezed
    assert "no text. Allowed: --prompt TEXT or --file PATH" in fail("generate", folder)
    assert "both" in fail("generate", folder, "--prompt", "a", "--file", "b")
    assert "cannot be read" in fail("generate", folder, "--file", tmp_path / "missing.txt")


def test_eval_sets_dense_beside_squeezed(squeezed):
    folder, _ = squeezed
    options = ("--tasks", "books_perplexity", "--length", 128, "--limit", 1)
    found = json.loads(succeed("eval", folder, *options, "--json"))
    assert list(found) == ["dense", "squeezed"]
    assert found["squeezed"]["books_perplexity"]["mode"] == "decode"
    assert re.search(r"decode, 128 tokens, 1 window", succeed("eval", folder, *options))


def test_eval_of_a_dense_model_and_by_recipe(pico):
    options = ("--tasks", "books_perplexity", "--length", 128, "--limit", 1, "--json")
    dense = json.loads(succeed("eval", pico, *options, "--mode", "prefill"))
    assert list(dense) == ["model"]
    both = json.loads(succeed("eval", pico, *options, "--mode", "prefill", "--recipe", "kv4"))
    assert both["dense"]["books_perplexity"]["value"] == pytest.approx(
        dense["model"]["books_perplexity"]["value"]
    )
    assert list(both) == ["dense", "squeezed"]


def test_eval_names_the_tasks_it_knows(pico):
    message = fail("eval", pico, "--tasks", "nedle", "--quiet")
    assert "'nedle'" in message
    assert "books_perplexity, needle" in message
    assert "Did you mean 'needle'?" in message


def test_bench_prints_both_columns(squeezed):
    folder, _ = squeezed
    options = ("--context", "32,64", "--tokens", 2, "--repeats", 1)
    found = json.loads(succeed("bench", folder, *options, "--json"))
    rows = [(row["model"], row["prompt_tokens"]) for row in found["results"]]
    assert rows == [("dense", 32), ("dense", 64), ("squeezed", 32), ("squeezed", 64)]
    assert all(row["decode_ms_per_token"] > 0 for row in found["results"])
    assert "64 tokens, batch 1, float32" in succeed("bench", folder, *options)


def test_bench_says_why_there_is_no_dense_column(squeezed, tmp_path):
    folder, _ = squeezed
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / "squeeze.json").read_text())
    manifest["source"] = str(tmp_path / "gone")
    (copy / "squeeze.json").write_text(json.dumps(manifest))
    options = ("--context", 32, "--tokens", 2, "--repeats", 1, "--json")
    result = invoke("bench", copy, *options)
    assert result.exit_code == 0
    assert "one column only" in result.stderr
    assert str(tmp_path / "gone") in result.stderr
    assert {row["model"] for row in json.loads(result.stdout)["results"]} == {"squeezed"}


def test_bench_refuses_a_context_that_is_no_number(squeezed):
    result = invoke("bench", squeezed[0], "--context", "2k")
    assert result.exit_code == 2
    assert "got '2k'; allowed: positive integers" in result.stderr


def test_export_copies_and_refuses_unknown_formats(squeezed, tmp_path):
    folder, _ = squeezed
    target = tmp_path / "copy"
    options = ("--format", "squeeze", "--output", target, "--json")
    found = json.loads(succeed("export", folder, *options))
    assert found == {"format": "squeeze", "output": str(target)}
    assert (target / "squeeze.json").is_file()
    message = fail("export", folder, "--format", "gguf")
    assert "'gguf'" in message
    assert "squeeze, compressed-tensors" in message


def test_inspect_measures_every_layer(pico, tmp_path):
    page = tmp_path / "sensitivity.html"
    found = json.loads(succeed("inspect", pico, "--bits", "2,4", "--plot", page, "--json"))
    seen = {(row["layer"], row["part"], int(row["bits"])) for row in found["rows"]}
    assert {(0, "keys", 2), (1, "keys", 4), (1, "values", 2), (0, "weights", 2)} <= seen
    assert "<svg" in page.read_text()


def test_compare_prints_both_reports(squeezed):
    folder, _ = squeezed
    assert "1.000" in succeed("compare", folder, folder / "report.json")
    found = json.loads(succeed("compare", folder, folder, "--json"))
    assert found["differences"] == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "kv5"], ["unknown recipe 'kv5'", "kv4", "Did you mean"]),
        (["plan", "kv4", "--set", "kv_cache.keys.bits=5"], ["kv_cache.keys.bits", "2, 3, 4, 8"]),
        (["plan", "kv4", "--set", "kv_cache.kees.bits=4"], ["'kees'", "Did you mean 'keys'?"]),
        (["plan", "kv4", "--set", "bits"], ["--set", "path=value"]),
        (["plan", "kv4", "--model", "./nowhere"], ["nowhere", "config.json"]),
        (["plan", "kv4", "--device", "tpu"], ["'tpu'", "cpu, cuda"]),
        (
            ["ls", "key"],
            ["unknown kind 'key'", "kv, transform, weights, prefill, activations, recipes"],
        ),
        (["compare", "a.json", "b.json"], ["a.json", "no such file"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_users_mistake_is_one_paragraph_and_exit_code_2(arguments, words):
    message = fail(*arguments)
    assert message.startswith("Error: ")
    for word in words:
        assert word in message


def test_debug_shows_the_traceback():
    result = invoke("plan", "kv5", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "RecipeError"


def test_an_error_of_ours_is_not_swallowed(monkeypatch):
    from squeeze import recipe

    def broken():
        raise RuntimeError("ours")

    monkeypatch.setattr(recipe, "schema", broken)
    result = invoke("schema")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_progress_prints_a_line_per_stage_away_from_a_terminal(capsys):
    with progress() as tell:
        for done in range(3):
            tell("calibrate", done + 1, 3)
    printed = capsys.readouterr()
    assert re.fullmatch(r"calibrate: 3/3, \d+\.\d s\n", printed.err)
    assert not printed.out
    with progress(quiet=True) as silent:
        assert silent is None


def test_generate_reads_standard_input(squeezed):
    folder, _ = squeezed
    arguments = ["generate", str(folder), "--file", "-", "--max-new-tokens", "3"]
    result = CliRunner().invoke(main, arguments, input="It was a bright")
    assert result.exit_code == 0
    assert result.stdout.startswith("It was a bright")
    assert re.search(r"3 tokens after \d+ in \d+\.\d s, cache \d+\.\d\d MB", result.stderr)
