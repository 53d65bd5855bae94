"""`python -m paper.bench` prints what it promises, as a table and as a record; `paper.picture` draws it.

Run: pytest tests/test_bench.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paper import bench_train
from paper.bench import main

ROOT = Path(__file__).parents[1]


def test_every_number_is_printed_and_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--sizes", "3m", "--seconds", "0", "--batch", "2"])
    main()
    out, table = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])
    sized, reached = record["bench"]["3m"], record["bench"]["machine"]
    ours, ways = sized["actions"]["side by side"], {"side by side", "one by one", "without cache"}
    times = {"prefill_ms", "chunk_ms", "chunk_ms_p95", "query_ms", "actions_s", "passes"}
    rates = {"tokens_s", "tokens_s_best", "best_batch", "peak_mb", "prefill_of_matmul", "chunk_of_bandwidth"}
    assert all(sized["actions"][way][name] > 0 for way in ways for name in times)
    assert all(ours[name] > 0 for name in rates)
    assert min(reached["matmul_flops_s"], reached["copy_bytes_s"]) > 0
    assert [sized["actions"][way]["passes"] for way in sorted(ways)] == [35, 7, 35]
    assert ours["same_codes"] == 1
    assert sized["frames"]["passes"] < sized["frames"]["passes_plain"] == 9  # eight of the state
    assert sized["frames"].keys() == {"ms_frame", "ms_frame_plain", "passes", "passes_plain"}
    assert record["commit"]
    assert all(name in table for name in (*ways, "transformers left out", "frame by drafts", "copy_bytes_s"))

    (tmp_path / "bench.json").write_text(out.splitlines()[-1])
    words = ["--speed", tmp_path / "bench.json", "--out", tmp_path / "speed.svg"]
    subprocess.run([sys.executable, "-m", "paper.picture", *words], check=True, capture_output=True)
    drawn = re.findall("<!-- (.*) -->", (tmp_path / "speed.svg").read_text())
    assert ways | {"frame by drafts", f"{ours['query_ms']:,.0f} ms", "3m: 3.8 M parameters"} <= set(drawn)


def test_the_picture_of_the_readme_is_of_the_records(tmp_path: Path) -> None:
    words = ["--speed", "bench/decoding", "bench/decoding_bfloat16", "--out", tmp_path / "speed.svg"]
    subprocess.run([sys.executable, "-m", "paper.picture", *words], check=True, capture_output=True)
    new, old = ((folder / "speed.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    assert re.findall("<!-- (.*) -->", new) == re.findall("<!-- (.*) -->", old), (
        "run python -m paper.picture --speed bench/decoding bench/decoding_bfloat16 --out docs/speed.svg"
    )


def test_a_training_step_is_measured_beside_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    words = ["--sizes", "3m", "--seconds", "0", "--rows", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_train", *words])
    bench_train.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    found, names = record["bench_train"]["3m"], ("step_ms", "tokens_s", "mfu", "peak_mb")
    assert all(found[way][name] > 0 for way in ("ours", "transformers") for name in names)
    assert found["ours"]["first_loss"] == pytest.approx(found["transformers"]["first_loss"], abs=1e-3)
    assert found["faster"] == pytest.approx(found["transformers"]["step_ms"] / found["ours"]["step_ms"])
    assert record["matmul_flops_s"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--device", "cuda"), "sees no CUDA device"),
        (("--sizes", "7b"), "7b: too large for a CPU, pass --device cuda"),
        (("--threads", "0"), "--batch and --threads must be at least 1, got 8, 0"),
        (("--batch", "0"), "got 0, 1"),
        (("--quantize", "int8"), "--quantize is of size 3m alone"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1), err
    assert line in err
