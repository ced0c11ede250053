"""``score --similarity_tokens``: experts of different layers compared, beside findings that stay as they are."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.checkpoint import Commands, read

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


def test_it_is_added_to_findings_that_are_there(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 6, "--data.batch_size", 4]
    args = ["score", *QUIET, "--model.path", checkpoint, *data, "--out", tmp_path]
    run.ok(*args)
    before, stats = read(tmp_path / "findings.json"), (tmp_path / "stats.safetensors").stat().st_mtime_ns
    assert "inter_layer" not in before and not (tmp_path / "figures" / "inter_layer.png").exists()
    run.ok(*args, "--similarity_tokens", 24)
    found = read(tmp_path / "findings.json")
    alike = found.pop("inter_layer")
    assert found == before and (tmp_path / "stats.safetensors").stat().st_mtime_ns == stats
    assert alike["tokens"] == 24 and len(alike["pairs"]) == 16 and 0 <= alike["between"] <= alike["within"] < 1
    assert (tmp_path / "figures" / "inter_layer.png").is_file()
    assert read(tmp_path / "score.json")["similarity_tokens"] == 24
    run.ok(*args, "--gradients", "true")
    assert read(tmp_path / "findings.json")["inter_layer"] == alike


def test_results_that_hold_more_than_is_asked_say_so(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """And what they hold more; asked for all of it, it is the very request."""
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 6, "--data.batch_size", 4]
    args = ["score", *QUIET, "--model.path", checkpoint, *data, "--out", tmp_path]
    gradients, similarity = ["--gradients", "true"], ["--similarity_tokens", 24]
    run.ok(*args, *gradients, *similarity)
    for asked, more in (
        ([], "--gradients and --similarity_tokens"),
        (gradients, "--similarity_tokens"),
        (similarity, "--gradients"),
    ):
        said = run.ok(*args, *asked).out
        assert f"and with {more} more than is asked now" in said and "This very request" not in said
    assert "This very request was carried out here before" in run.ok(*args, *gradients, *similarity).out
    assert "more than is asked" not in run.ok(*args, "--overwrite").out
    assert "This very request was carried out here before" in run.ok(*args).out


def test_too_few_tokens_are_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    args = ["score", *QUIET, "--model.path", checkpoint, "--data.path", text, "--similarity_tokens", 2]
    refused = run(*args, "--out", tmp_path / "run")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "--similarity_tokens 2: between 4" in refused.err
    assert not (tmp_path / "run").exists()
